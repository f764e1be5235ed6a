"""Whether the hub can be reached: asked once, shortly, so that a machine without a network does not wait and retry."""

from __future__ import annotations

import json
import os
import re
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError, closest
from nesso_tune.planning.shapes import TABLE, unsupported
from nesso_tune.recipes.builtin import is_result, local_path
from nesso_tune.recipes.sections import ModelSection

PATIENCE_S = 3.0
PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def set_offline_if_unreachable() -> None:
    """Sets `HF_HUB_OFFLINE` for this process if the hub does not answer: its libraries then look into the cache alone.

    To be called before they are imported, when they read it. Behind a proxy nothing is tried: the proxy decides.
    """
    if "HF_HUB_OFFLINE" not in os.environ and not any(os.environ.get(name) for name in PROXIES) and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


@lru_cache(maxsize=1)
def _reachable() -> bool:
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "huggingface.co", port), timeout=PATIENCE_S):
            return True
    except OSError:
        return False


TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "config.json",
                   "generation_config.json", "chat_template*"]  # fmt: skip

ADAPTER = "adapter_config.json"


def base_folder(base: str, revision: str | None = None, weights: bool = False, where: str | None = None) -> Path:
    """The local folder with the base's tokenizer and configuration, and its weights if asked for.

    Args:
        base: folder or hub id.
        revision: of a hub model.
        weights: whether weights are needed too.
        where: what errors call the base; the recipe's key by default.

    Raises:
        ModelError: if there is no such folder or hub model.
        RecipeError: for a revision of a local folder.
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
        raise ModelError(where, "is a file, not a model folder", "name the folder that holds config.json")
    if not is_hub_id(base):
        raise _no_such_folder(base, where)
    return _from_hub(base, revision, [*TOKENIZER_FILES, *(["*.safetensors", "*.json"] if weights else [])], where)


def check_local_base(model: ModelSection) -> None:
    """What can be known of a base without the hub.

    Raises:
        ModelError: for a path that is no whole model, and for what could be a hub id but stands among folders here: it
            is a path then, most likely misspelt.
    """
    base = model.base
    check_pinned(model)
    if not local_path(base).exists():
        if is_result(base) or (is_hub_id(base) and (base in TABLE or not local_path(base).parent.is_dir())):
            return
        raise _no_such_folder(base, f"model.base {base}")
    check_model_folder(base_folder(base, model.revision), model)


def check_pinned(model: ModelSection) -> None:
    """Code from the hub runs only as it was read: of a commit, not of a name that may mean other code tomorrow.

    Raises:
        RecipeError: for `trust_remote_code` without a full commit.
    """
    here = local_path(model.base).exists() or not is_hub_id(model.base)
    if model.trust_remote_code and not here and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        said = f"revision {model.revision} may mean other code tomorrow" if model.revision else "no revision is pinned"
        raise RecipeError(
            "model.trust_remote_code", f"would run code of {model.base}, and {said}",
            "set model.revision to the full commit (40 hex digits) that you have read",
        )  # fmt: skip


def check_model_folder(folder: Path, model: ModelSection) -> None:
    """Raises ModelError if a base's folder lacks configuration, tokenizer or weights, or holds an adapter."""
    where = f"model.base {model.base}"
    if (folder / ADAPTER).is_file():  # transformers would load the base that the adapter names, and the adapter
        if (folder / "config.json").is_file() and has_weights(folder):
            remedy = f"remove {ADAPTER} if the weights are whole, else merge the adapter (peft: merge_and_unload)"
        else:
            remedy = "merge it into its base (peft: merge_and_unload) and name the folder of the result"
        raise ModelError(where, f"holds an adapter ({ADAPTER})", remedy)
    if not (folder / "config.json").is_file():
        in_run = (folder / "final" / "config.json").is_file()
        remedy = f"name {model.base.rstrip('/')}/final" if in_run else "name a folder that holds a whole model"
        raise ModelError(where, "has no config.json", remedy)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(where, "its config.json cannot be read", "fetch the model again")
    if (reason := unsupported(config)) is not None:
        raise ModelError(where, reason, "use another base")
    if not tokenizer_files(folder):
        raise ModelError(
            where, "has no tokenizer (no tokenizer.json, nor files to make one from)", "name a complete model folder"
        )
    if not model.random_init and not has_weights(folder):
        raise ModelError(
            where, "has no weights (*.safetensors)",
            "name a folder with weights, or set model.random_init: true to start from random ones",
        )  # fmt: skip


def has_weights(folder: Path) -> bool:
    """Whether a model folder has weights in the one format that is read."""
    return any(file.is_file() for file in folder.glob("*.safetensors"))


def missing_base_note(base: str) -> str | None:
    """What to say of a base that is not here: that a run makes it, or that it may be misspelt. None if it is here."""
    if local_path(base).is_dir() or base in TABLE:
        return None
    if is_result(base):
        return f"{base} is not there yet: an earlier recipe makes it"
    return f"{base} is neither here nor a known base: its size is open{_near(base)}"


def _near(base: str) -> str:
    """A known base, or a folder beside it, whose name is nearly the same."""
    if base in TABLE:
        return ""
    parent = local_path(base).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    guess = closest(base, [*TABLE, *folders], 0.8)
    exact = next((name for name in TABLE if name.lower() == base.lower()), guess)
    return f"; did you mean {exact}?" if exact else ""


def _no_such_folder(base: str, where: str) -> ModelError:
    near = _near(base)
    if near:
        return ModelError(where, "no such folder", near.removeprefix("; "))
    hint = "run the recipe that makes it first" if is_result(base) else "check the path, or name a hub id"
    return ModelError(where, "no such folder", hint)


def local_base_folder(base: str, revision: str | None = None) -> Path | None:
    """The folder of a base that is here: a local one, or the hub's cache of it; None if nothing of it was fetched.

    Raises:
        ModelError: for a path that is no folder, unless a run is to make it.
    """
    if local_path(base).exists() or (not is_result(base) and not is_hub_id(base)):
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


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that its tokenizer is made of; none if it has no tokenizer."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    files = sorted(file for file in found if file.name not in ("config.json", "generation_config.json"))
    return files if any(file.name.endswith(("tokenizer.json", ".model", "vocab.json")) for file in files) else []


def is_hub_id(base: str) -> bool:
    """Whether a base that is no folder here may be one on the hub."""
    return not base.startswith((".", "/", "~")) and base.count("/") == 1 and not is_result(base)


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
        raise ModelError(where, "the hub asks for consent", "accept its terms and set HF_TOKEN") from None
    except LocalEntryNotFoundError:
        raise RunEnvironmentError(
            where, "no such folder here, and the hub cannot be reached to look for it",
            f"check the name{_near(repo)}, or run `nesso-tune prepare` where there is a network",
        ) from None  # fmt: skip
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(where, "no such folder here and no such model on the hub", "check the name") from None
    except RevisionNotFoundError:
        raise ModelError(where, f"has no revision {revision}", "check model.revision") from None
    except OSError as error:
        raise RunEnvironmentError(where, f"cannot be fetched ({error})", "check the network and the disk") from None
