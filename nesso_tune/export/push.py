"""Upload of an export to the Hugging Face Hub. Nothing private, unfinished or unknown is uploaded."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from nesso_tune.errors import ModelError, Problem, RecipeError, RunEnvironmentError, first_line
from nesso_tune.export.card import CARD, placeholders, placeholders_of_exports
from nesso_tune.export.exporter import MARK
from nesso_tune.export.stages import PROVENANCE
from nesso_tune.export.weights import FinishedRun
from nesso_tune.files import format_bytes, sha256
from nesso_tune.hub import ADAPTER_CONFIG, check_repository_name, http_error
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.sections import Source
from nesso_tune.runs.layout import RECIPE

OPTION = "--push"
TOKEN = "HF_TOKEN"
# Files of exports. Anything else, such as the state of an optimizer, metrics or data, is refused.
PUBLISHED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "model*.safetensors", "model.safetensors.index.json", ADAPTER_CONFIG,
    "adapter_model.safetensors", "*.gguf", CARD, PROVENANCE,
)  # fmt: skip
OF_THE_HUB = (".gitattributes",)  # files that the hub creates in a new repository
SCANNED = (".json", ".md", ".jinja")  # text that is searched for names of private sources


@dataclass(frozen=True)
class Upload:
    """Files to upload to a repository of the hub.

    Attributes:
        folder: the export.
        repo: ORG/NAME.
        public: whether everybody can read the repository.
        files: names of the files.
        problems: what must be done before they can be uploaded.
    """

    folder: Path
    repo: str
    public: bool
    files: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    def lines(self) -> list[str]:
        """Every file with its size, who can read it, and what must be done before the upload."""
        sizes = [(self.folder / name).stat().st_size for name in self.files]
        readers = "public: everybody can read it" if self.public else "private: members of the organisation can read it"
        listed = [f"  {format_bytes(size):>8}  {name}" for name, size in zip(self.files, sizes, strict=True)]
        return [
            f"{self.repo} ({readers}), {len(sizes)} files, {format_bytes(sum(sizes))}:",
            *listed,
            *map(str, self.problems),
        ]

    @property
    def next_step(self) -> str:
        """What the user can do after the files were listed."""
        return "complete the above first" if self.problems else "--yes uploads these files"


def plan_upload(run: FinishedRun, folder: Path, repo: str, public: bool) -> Upload:
    """Checks what would be uploaded, without a network. What is not complete yet is in `Upload.problems`.

    Raises:
        RecipeError: for a malformed repository name.
        ModelError: if the folder has files that do not belong to a model, or names a private source.
    """
    check_repository_name(repo)
    files = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    unknown = [name for name in files if not any(fnmatchcase(name, pattern) for pattern in PUBLISHED)]
    if unknown:
        raise ModelError(
            OPTION,
            f"{folder / unknown[0]} is not a file of a model",
            "remove it from the folder: it would be published",
        )
    check_card_section(run)
    _check_private(run, folder, files)
    card = (folder / CARD).read_text(encoding="utf-8")
    return Upload(
        folder, repo, public, tuple(files), _problems(run, placeholders(card), is_adapter=ADAPTER_CONFIG in files)
    )


def check_complete(run: FinishedRun, format: str) -> None:
    """Checks before an export whether it can be uploaded: its card is complete, and others can load it.

    Raises:
        RecipeError: with everything that is missing.
    """
    missing = placeholders_of_exports(run.path, run.recipe)
    if problems := _problems(run, missing, is_adapter=format == "adapter"):
        raise RecipeError(problems)


def _problems(run: FinishedRun, missing: Sequence[tuple[str, str]], is_adapter: bool) -> tuple[Problem, ...]:
    """The placeholders of a card, and a base that nobody else has."""
    found = [Problem(CARD, f"{what} is missing", remedy) for what, remedy in missing]
    if is_adapter and local_path(run.recipe.model.base).is_dir():
        what = f"the base is the local folder {run.recipe.model.base}, so nobody else can load the adapter"
        remedy = f"upload the base, and name its ORG/NAME as model.base in {run.path / RECIPE}; or export --to hf"
        found.append(Problem(ADAPTER_CONFIG, what, remedy))
    return tuple(found)


def check_card_section(run: FinishedRun) -> None:
    """Raises ModelError if the card section of a run contains the path or the alias of a private source.

    An alias can be any word, so the files that nesso-tune writes are not searched for it.
    """
    text = "\n".join(text for text in run.recipe.card.model_dump().values() if text)
    aliases = {source.alias for source in _private_sources(run) if source.alias}
    _check_names(f"{run.path / RECIPE} (card)", text, _private_paths(run) | aliases)


def _check_private(run: FinishedRun, folder: Path, files: Sequence[str]) -> None:
    """Raises ModelError if a text file contains the path of a private source."""
    for name in (name for name in files if name.endswith(SCANNED)):
        _check_names(str(folder / name), (folder / name).read_text(encoding="utf-8"), _private_paths(run))


def _private_sources(run: FinishedRun) -> list[Source]:
    return [source for source in (*run.recipe.data.sources, *run.recipe.data.validation_sources) if source.private]


def _private_paths(run: FinishedRun) -> set[str]:
    paths = {source.path for source in _private_sources(run)}
    return paths | {Path(path).name for path in paths if Path(path).suffix}


def _check_names(where: str, text: str, names: Collection[str]) -> None:
    if any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for name in names):
        raise ModelError(OPTION, f"{where} names a private source", "remove its name from the card section")


def push(upload: Upload) -> str:
    """Creates the repository and uploads the files in one commit; the same call continues an interrupted upload.

    Returns:
        The address of the repository.

    Raises:
        RecipeError: if something must be done first.
        RunEnvironmentError: without a token, if the hub refuses or cannot be reached, or if the repository contains
            another model.
    """
    if upload.problems:
        raise RecipeError(upload.problems)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=_token())
    where = f"--repo {upload.repo}"
    try:
        _check_repository(api, upload)
        url = api.create_repo(upload.repo, private=not upload.public, exist_ok=True)
        additions = [CommitOperationAdd(name, upload.folder / name) for name in upload.files]
        for addition in additions:  # one by one: a file that was uploaded before is skipped
            api.preupload_lfs_files(upload.repo, [addition], free_memory=False)
        api.create_commit(upload.repo, additions, commit_message="Upload by nesso-tune")
    except OfflineModeIsEnabled:
        raise RunEnvironmentError(where, "HF_HUB_OFFLINE is set", "unset it to upload") from None
    except HFValidationError as error:
        raise RecipeError("--repo", first_line(error), "write ORG/NAME") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = (
            f"use a {TOKEN} that can write to it" if status in (401, 403) else "run the same command again to continue"
        )
        raise RunEnvironmentError(where, f"the hub refuses the upload ({first_line(error)})", remedy) from None
    except (http_error(), OSError, RuntimeError, ValueError) as error:  # of the connection or the client
        remedy = "run the same command again to continue"
        raise RunEnvironmentError(where, f"the upload failed ({first_line(error)})", remedy) from None
    return str(url)


def _token() -> str:
    """The token of the hub. It is never printed: HTTP libraries quote one that they cannot send."""
    token = os.environ.get(TOKEN, "").strip()  # of a file with line breaks, for example
    if not token:
        what, remedy = "is not set", f"export {TOKEN} with a token that can write"
    elif not (token.isascii() and token.isprintable()) or " " in token:
        what, remedy = "has characters that no token has", "copy the token from the hub again"
    else:
        return token
    raise RunEnvironmentError(OPTION, f"the environment variable {TOKEN} {what}", remedy)


def _check_repository(api: HfApi, upload: Upload) -> None:
    """Raises RunEnvironmentError if an existing repository contains anything but files of this upload."""
    try:
        found = [entry for entry in api.list_repo_tree(upload.repo, recursive=True) if isinstance(entry, RepoFile)]
        is_private = api.model_info(upload.repo).private
    except RepositoryNotFoundError:
        return
    remedy = "choose another name, or delete the repository on the hub"
    others = [entry.path for entry in found if entry.path not in OF_THE_HUB and not _is_same(entry, upload)]
    if others:
        raise RunEnvironmentError(f"--repo {upload.repo}", f"exists and has another {others[0]}", remedy)
    if is_private == upload.public:
        kind = "private" if is_private else "public"
        raise RunEnvironmentError(f"--repo {upload.repo}", f"exists and is {kind}", remedy)


def _is_same(entry: RepoFile, upload: Upload) -> bool:
    """Whether a file in the repository has the content of the file to upload."""
    if entry.path not in upload.files:
        return False
    file = upload.folder / entry.path
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == sha256(file))
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)  # as git names files
    return bool(entry.blob_id == blob.hexdigest())
