"""Data files behind URLs (`s3://`, `gs://`, `hf://`, `https://`), copied into the cache through fsspec.

A copy is used again while the store reports the same size and tag (ETag, checksum, time) for the file. Without a
network (`HF_HUB_OFFLINE`, or the store cannot be reached) the last copy is used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from uuid import uuid4

from nesso_tune.cache import cache_root, key_of
from nesso_tune.data.files import choose_split, is_data_name, is_glob
from nesso_tune.errors import DataError, NessoError, RunEnvironmentError, first_line
from nesso_tune.files import atomic_replace, atomic_write
from nesso_tune.hub import set_offline_if_unreachable
from nesso_tune.logs import logger

KIND = "remote"  # folder of the cache
_INDEX = "files.json"
_TAG_KEYS = ("size", "ETag", "etag", "md5Hash", "generation", "VersionId", "LastModified", "last_modified", "mtime",
             "updated", "created", "blob_id")  # fmt: skip
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_TIMEOUT_S = 30.0  # until a web server answers


class RemoteFile(NamedTuple):
    """The copy of a remote file, and its URL."""

    path: Path
    url: str


def remote_files(url: str, split: str, quiet: bool = False) -> list[RemoteFile]:
    """The copies of the files that a URL, a remote folder or a remote pattern means, downloaded where they changed.

    Args:
        url: of a file, a folder or a pattern.
        split: the split to choose where the names of several files carry splits.
        quiet: gives no messages, which name the files.

    Raises:
        DataError: if there are none, or they would mix splits.
        RunEnvironmentError: if the store cannot be reached or needs a package, and there is no copy.
    """
    return list(_remote_files(url, split, quiet, str(cache_root())))


def is_downloaded(url: str, split: str) -> bool:
    """Whether there is a copy of the files of a URL."""
    return bool(_copies(_folder(url, split)))


class _Listed(NamedTuple):
    """A file of a store: its name below the URL, its path in the store, its URL, and a tag of its content."""

    name: str
    path: str
    url: str
    tag: str


def _folder(url: str, split: str) -> Path:
    return cache_root() / KIND / key_of([url, split])


@lru_cache(maxsize=64)  # once a process
def _remote_files(url: str, split: str, quiet: bool, root: str) -> tuple[RemoteFile, ...]:
    folder = _folder(url, split)
    copies = _copies(folder)
    if os.environ.get("HF_HUB_OFFLINE") == "1" and copies:
        return copies
    try:
        return _download(url, split, folder, quiet)
    except NessoError as error:
        if not copies or not isinstance(error, RunEnvironmentError):
            raise
        where = "a private source" if quiet else error.problems[0].where
        logger.warning(f"{where}: {'cannot be read' if quiet else error.problems[0].what}; using the last copy")
        return copies


def _copies(folder: Path) -> tuple[RemoteFile, ...]:
    """The complete copy of an earlier download; empty if there is none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        copies = tuple(RemoteFile(folder / entry["file"], entry["url"]) for entry in index)
        if all(copy.path.is_file() for copy in copies):
            return copies
    return ()


def _download(url: str, split: str, folder: Path, quiet: bool) -> tuple[RemoteFile, ...]:
    protocol = urlsplit(url).scheme.lower()
    if protocol == "hf":
        set_offline_if_unreachable()
    with _errors(url, protocol):
        store: _Web | _Store = _Web(url) if protocol in ("http", "https") else _Store(url)
        listed = store.files()
    if not listed:
        raise DataError(url, "there is no data file (.jsonl, .json, .csv, .parquet, .arrow)", "check the URL")
    if len(listed) > 1:
        indices, _ = choose_split(url, [file.name for file in listed], split)
        listed = [listed[i] for i in indices]
    copies = []
    for file in listed:
        copy = folder / file.tag / PurePosixPath(file.name).name
        copies.append(RemoteFile(copy, file.url))
        if copy.is_file():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not quiet:
            logger.info(f"downloading {file.url}")
        with (
            _errors(file.url, protocol), atomic_replace(copy) as staging, staging.open("wb") as out,
            store.open(file.path) as source,
        ):  # fmt: skip
            shutil.copyfileobj(source, out, 1 << 20)
    index = [{"file": str(copy.path.relative_to(folder)), "url": copy.url} for copy in copies]
    atomic_write(folder / _INDEX, json.dumps(index))
    return tuple(copies)


class _Store:
    """A file system of fsspec."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self._url = url
        self._system, self._root = url_to_fs(url)

    def files(self) -> list[_Listed]:
        """The data files that the URL means, sorted by name."""
        if is_glob(self._root):
            fixed = self._root[: min(self._root.find(char) for char in "*?[" if char in self._root)]
            root, found = fixed.rpartition("/")[0], self._system.glob(self._root, detail=True)
        elif self._system.isdir(self._root):
            root, found = self._root, self._system.find(self._root, detail=True)
        else:
            info = self._system.info(self._root)
            return [self._listed(self._root.rpartition("/")[2], self._root, info)._replace(url=self._url)]
        names = {path: path.removeprefix(root).lstrip("/") for path in found if found[path].get("type") == "file"}
        return [self._listed(name, path, found[path]) for path, name in sorted(names.items()) if is_data_name(name)]

    def open(self, path: str) -> Any:
        """Opens a file for reading."""
        return self._system.open(path, "rb")

    def _listed(self, name: str, path: str, info: Mapping[str, Any]) -> _Listed:
        known = {key: str(info[key]) for key in _TAG_KEYS if info.get(key) is not None}
        return _Listed(name, path, self._system.unstrip_protocol(path), key_of([path, known]))


class _Web:
    """One file of a web server. Python's own client reads it: fsspec would need another package."""

    def __init__(self, url: str) -> None:
        self._url = url

    def files(self) -> list[_Listed]:
        """The file, with the tag that the server gives it; a new tag each time if it gives none."""
        from urllib import request  # takes 20 ms, which `check` does not need

        try:
            with request.urlopen(request.Request(self._url, method="HEAD"), timeout=_TIMEOUT_S) as answer:
                headers = dict(answer.headers.items())
        except HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise
            headers = {}  # a server that does not answer HEAD
        lower = {name.lower(): value for name, value in headers.items()}
        known = {name: lower[name] for name in ("etag", "last-modified", "content-length") if name in lower}
        tag = key_of([self._url, known if len(known) > ("content-length" in known) else uuid4().hex])
        name = PurePosixPath(urlsplit(self._url).path).name or "rows"
        return [_Listed(name, self._url, self._url, tag)]

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Opens the file for reading. Raises OSError if it ends early."""
        from urllib import request

        with request.urlopen(path, timeout=_TIMEOUT_S) as answer:
            yield answer
            if answer.length:  # bytes that the server announced and did not send
                raise ConnectionError(f"{answer.length} bytes are missing")


@contextmanager
def _errors(url: str, protocol: str) -> Iterator[None]:
    """Turns the errors of all stores into errors with a remedy."""
    try:
        yield
    except NessoError:
        raise
    except ImportError as error:
        raise RunEnvironmentError(url, f"cannot be read ({first_line(error)})", _install(protocol)) from None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(url, "there is no such file", "check the URL") from None
    except HTTPError as error:
        remedy = "check the URL" if error.code in (404, 410) else "check the URL and the access rights"
        raise DataError(url, f"the server answers {error.code} {error.reason}", remedy) from None
    except PermissionError as error:
        raise DataError(url, f"cannot be read ({first_line(error)})", "check the credentials of the store") from None
    except Exception as error:  # each store has errors of its own
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise DataError(url, f"`{protocol}://` is not a known kind of URL", "use s3, gs, hf or https") from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # of the local disk
        what = f"cannot be read ({type(error).__name__}: {first_line(error)})"
        raise RunEnvironmentError(
            url, what, "check network and credentials, or run `nesso-tune prepare` on a machine that reaches it"
        ) from None  # fmt: skip


def _install(protocol: str) -> str:
    """The command that installs what a protocol needs; stores of fsspec have fsspec's version."""
    from fsspec import __version__
    from fsspec.registry import known_implementations

    package = _PACKAGES.get(protocol)
    if package in ("s3fs", "gcsfs"):
        return f"pip install {package}=={__version__}"
    known = known_implementations.get(protocol, {})
    return f"pip install {package}" if package else str(known.get("err", "install the package that fsspec needs"))
