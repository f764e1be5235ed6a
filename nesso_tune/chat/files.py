"""The files of a base model: in a folder, or fetched from the hub into its local cache."""

from __future__ import annotations

from pathlib import Path

from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError
from nesso_tune.recipes.shipped import local_path

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "config.json",
                   "generation_config.json", "chat_template*"]  # fmt: skip


def base_folder(base: str, revision: str | None = None, weights: bool = False) -> Path:
    """The local folder with the base's tokenizer and configuration, and its weights if asked for.

    Raises:
        ModelError: if there is no such folder or hub model.
        RecipeError: for a revision of a local folder.
        RunEnvironmentError: if the hub cannot be reached and the files are not in its cache.
    """
    folder = local_path(base)
    if folder.is_dir():
        if revision is not None:
            raise RecipeError("model.revision", f"has no effect on the folder {base}", "remove it")
        if not any(folder.iterdir()):
            raise ModelError(base, "the folder is empty", "name a folder with config.json, tokenizer.json and weights")
        return folder
    if folder.exists():
        raise ModelError(base, "is a file, not a model folder", "name the folder that holds config.json")
    if not is_hub_id(base):
        hint = "run the recipe that makes it first" if base.endswith("/final") else "check the path, or name a hub id"
        raise ModelError(f"model.base {base}", "no such folder", hint)
    return _from_hub(base, revision, [*TOKENIZER_FILES, *(["*.safetensors", "*.json"] if weights else [])])


def base_at_hand(base: str, revision: str | None = None) -> Path | None:
    """The folder of a base that is here: a local one, or the hub's cache of it; None if nothing of it was fetched.

    Raises:
        ModelError: for a path that is no folder, unless a run is to make it.
    """
    if local_path(base).exists() or (not base.endswith("/final") and not is_hub_id(base)):
        return base_folder(base, revision)
    if not is_hub_id(base):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that its tokenizer is made of; none if it has no tokenizer."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    files = sorted(file for file in found if file.name not in ("config.json", "generation_config.json"))
    return files if any(file.name.endswith(("tokenizer.json", ".model", "vocab.json")) for file in files) else []


def is_hub_id(base: str) -> bool:
    """Whether a base that is no folder here may be one on the hub."""
    return not base.startswith((".", "/", "~")) and base.count("/") == 1 and not base.endswith("/final")


def _from_hub(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"model.base {repo}"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(where, "the hub asks for consent", "accept its terms and set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise RunEnvironmentError(
            where, "no such folder here, and the hub cannot be reached to look for it",
            "check the path, or run `nesso-tune prepare` where there is a network",
        ) from None  # fmt: skip
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(where, "no such folder here and no such model on the hub", "check the name") from None
    except RevisionNotFoundError:
        raise ModelError(where, f"has no revision {revision}", "check model.revision") from None
    except OSError as error:
        raise RunEnvironmentError(where, f"cannot be fetched ({error})", "check the network and the disk") from None
