"""The base model: a local folder or a snapshot from the Hugging Face Hub, and checks that need no network."""

from __future__ import annotations

import json
import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError, closest
from nesso_tune.planning.shapes import KNOWN_CONFIGS, unsupported
from nesso_tune.recipes.builtin import is_run_output, local_path
from nesso_tune.recipes.sections import ModelSection

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "config.json",
                   "generation_config.json", "chat_template*"]  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"
CONNECT_TIMEOUT_S = 3.0
PROXY_VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def base_folder(base: str, revision: str | None = None, weights: bool = False, where: str | None = None) -> Path:
    """The local folder of the base model with its tokenizer and configuration, downloaded if needed.

    Args:
        base: folder or hub id.
        revision: commit, branch or tag of a hub model.
        weights: also fetch the weights.
        where: the place named in errors; the recipe key by default.

    Raises:
        ModelError: if the folder or the hub model does not exist.
        RecipeError: if a revision is given for a local folder.
        RunEnvironmentError: if the hub cannot be reached and the files are not in its cache.
    """
    folder, where = local_path(base), where or f"model.base {base}"
    if folder.is_dir():
        if revision is not None:
            raise RecipeError("model.revision", f"has no effect on the folder {base}", "remove it")
        if not any(folder.iterdir()):
            raise ModelError(where, "the folder is empty", "name a folder with config.json, tokenizer.json and weights")
        return folder
    if folder.exists():
        raise ModelError(where, "is a file, not a model folder", "name the folder that contains config.json")
    if not is_hub_id(base):
        raise _no_such_folder(base, where)
    return _from_hub(base, revision, [*TOKENIZER_FILES, *(["*.safetensors", "*.json"] if weights else [])], where)


def local_base_folder(base: str, revision: str | None = None) -> Path | None:
    """The local folder of a base model, or its snapshot in the hub's cache; None if it was not downloaded.

    Raises:
        ModelError: if a path is not a folder, unless a run will create it.
    """
    if local_path(base).exists() or (not is_run_output(base) and not is_hub_id(base)):
        return base_folder(base, revision)
    if not is_hub_id(base):
        return None
    set_offline_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _from_hub(repo: str, revision: str | None, patterns: list[str], where: str) -> Path:
    set_offline_if_unreachable()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ModelError(where, "the model is gated on the hub", "accept its terms there and set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise RunEnvironmentError(
            where, "no such local folder, and the hub cannot be reached",
            f"check the name{_suggestion(repo)}, or run `nesso-tune prepare` on a machine with network access",
        ) from None  # fmt: skip
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(where, "no such local folder, and no such model on the hub", "check the name") from None
    except RevisionNotFoundError:
        raise ModelError(where, f"has no revision {revision}", "check model.revision") from None
    except (http_error(), OSError) as error:
        raise RunEnvironmentError(where, f"download failed ({error})", "check the network and the disk") from None


def http_error() -> type[Exception]:
    """The base class of the errors of the HTTP library under huggingface_hub, which its version decides."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__mro__[1]
    return base


def set_offline_if_unreachable() -> None:
    """Sets `HF_HUB_OFFLINE` for this process if the hub cannot be reached, which avoids timeouts and retries.

    Call it before `huggingface_hub` is imported, which reads the variable then. Behind a proxy it does nothing.
    """
    behind_proxy = any(os.environ.get(name) for name in PROXY_VARIABLES)
    if "HF_HUB_OFFLINE" not in os.environ and not behind_proxy and not _hub_is_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


@lru_cache(maxsize=1)
def _hub_is_reachable() -> bool:
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "huggingface.co", port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def check_local_base(model: ModelSection) -> None:
    """Checks a base model without network access.

    Raises:
        ModelError: if a local folder is incomplete, or if the name is not found: a name whose parent folder exists is a
            misspelt path rather than a hub id.
        RecipeError: see `check_pinned`.
    """
    base = model.base
    check_pinned(model)
    if not local_path(base).exists():
        if is_run_output(base) or (is_hub_id(base) and (base in KNOWN_CONFIGS or not local_path(base).parent.is_dir())):
            return
        raise _no_such_folder(base, f"model.base {base}")
    check_model_folder(base_folder(base, model.revision), model)


def check_pinned(model: ModelSection) -> None:
    """Requires a full commit hash for code from the hub: a branch or tag can point to different code later.

    Raises:
        RecipeError: if `trust_remote_code` is set without a full commit hash.
    """
    is_local = local_path(model.base).exists() or not is_hub_id(model.base)
    if model.trust_remote_code and not is_local and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        why = f"revision {model.revision} can change" if model.revision else "no revision is pinned"
        raise RecipeError(
            "model.trust_remote_code", f"would run code of {model.base}, and {why}",
            "set model.revision to the full hash (40 hex digits) of a commit that you have reviewed",
        )  # fmt: skip


def check_model_folder(folder: Path, model: ModelSection) -> None:
    """Raises ModelError if a model folder lacks configuration, tokenizer or weights, or contains an adapter."""
    where = f"model.base {model.base}"
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load the adapter on top of the base that it names
        if (folder / "config.json").is_file() and has_weights(folder):
            merge = "merge the adapter (peft: merge_and_unload)"
            remedy = f"remove {ADAPTER_CONFIG} if the weights are complete, else {merge}"
        else:
            remedy = "merge it into its base (peft: merge_and_unload) and name the folder of the result"
        raise ModelError(where, f"contains an adapter ({ADAPTER_CONFIG})", remedy)
    if not (folder / "config.json").is_file():
        in_run = (folder / "final" / "config.json").is_file()
        remedy = f"name {model.base.rstrip('/')}/final" if in_run else "name a folder with a complete model"
        raise ModelError(where, "has no config.json", remedy)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(where, "its config.json cannot be read", "download the model again")
    if (reason := unsupported(config)) is not None:
        raise ModelError(where, reason, "use another base")
    if not tokenizer_files(folder):
        raise ModelError(
            where, "has no tokenizer (no tokenizer.json, and no files to convert)", "name a complete model folder"
        )
    if not model.random_init and not has_weights(folder):
        raise ModelError(
            where, "has no weights (*.safetensors)",
            "name a folder with weights, or set model.random_init: true for random weights",
        )  # fmt: skip


def has_weights(folder: Path) -> bool:
    """Whether a model folder has safetensors weights, the only supported format."""
    return any(file.is_file() for file in folder.glob("*.safetensors"))


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of a folder; an empty list if it has no tokenizer."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    files = sorted(file for file in found if file.name not in ("config.json", "generation_config.json"))
    return files if any(file.name.endswith(("tokenizer.json", ".model", "vocab.json")) for file in files) else []


def check_repository_name(repo: str) -> None:
    """Raises RecipeError unless a name has the form ORG/NAME, in the characters that the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        if repo.count("/") != 1:
            raise RecipeError("--repo", f"{repo} is not a repository name", "write ORG/NAME")
        validate_repo_id(repo)
    except HFValidationError:
        what = f"{repo} is not a repository name of the hub"
        remedy = "use letters, digits, -, _ and . (not at an end or twice, and no .git), at most 96 in each part"
        raise RecipeError("--repo", what, remedy) from None


def is_hub_id(base: str) -> bool:
    """Whether a name that is not a local folder has the form of a hub id."""
    return not base.startswith((".", "/", "~")) and base.count("/") == 1 and not is_run_output(base)


def missing_base_note(base: str) -> str | None:
    """A note about a base model that is not found: a run creates it, or its name may be misspelt. Else None."""
    if local_path(base).is_dir() or base in KNOWN_CONFIGS:
        return None
    if is_run_output(base):
        return f"{base} does not exist yet: an earlier recipe creates it"
    return f"{base} is not a local folder or a known model, so its size is unknown{_suggestion(base)}"


def _no_such_folder(base: str, where: str) -> ModelError:
    near = _suggestion(base)
    if near:
        return ModelError(where, "no such folder", near.removeprefix("; "))
    hint = "run the recipe that creates it first" if is_run_output(base) else "check the path, or name a hub id"
    return ModelError(where, "no such folder", hint)


def _suggestion(base: str) -> str:
    """`; did you mean …?` with a known model or a folder of a similar name, or an empty string."""
    if base in KNOWN_CONFIGS:
        return ""
    parent = local_path(base).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    guess = closest(base, [*KNOWN_CONFIGS, *folders], 0.8)
    exact = next((name for name in KNOWN_CONFIGS if name.lower() == base.lower()), guess)
    return f"; did you mean {exact}?" if exact else ""
