"""User-defined readers: a function in a Python file that converts any row to a known format.

A recipe names it as `format: readers.py:faq`. The function gets a row as a dict. It returns a dict of a known format
(`messages`; `prompt` and `response`; `prompt`, `chosen` and `rejected`; `text`; `input_ids` and `labels`), a
Conversation, a PreferencePair, or None to skip the row:

    def faq(row):
        return {"prompt": row["q"], "response": row["answers"][0]}

The prepared data is cached by the code of the reader, including the user's own modules that it imports.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from nesso_tune.data.files import content_hash, files_under
from nesso_tune.errors import RecipeError, closest, first_line
from nesso_tune.recipes.builtin import local_path, reader_file

ReaderFunction = Callable[[dict[str, Any]], Any]
ModuleFiles = dict[str, Path | None]  # files of imported modules; None for modules that are not the user's own

_STDLIB = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


@dataclass(frozen=True)
class UserReader:
    """A user-defined function that reads rows.

    Attributes:
        name: as in the recipe.
        function: takes a row, returns a row of a known format, a Conversation, a PreferencePair, or None.
        code: hash of its name, its file, the user's modules that the file imports, and the files it declares to read.
    """

    name: str
    function: ReaderFunction
    code: str


_loaded: dict[str, UserReader] = {}
# Per reader: the modules outside its folder, resolved once after loading, so that reading rows does not change `code`
_module_files: dict[str, ModuleFiles] = {}
_sources_at_import: dict[str, bytes] = {}  # source of each of these modules when it was first hashed


def is_user_reader(name: str) -> bool:
    """Whether a source's `format` names a function."""
    return ".py:" in name


def load_user_reader(name: str, reads: Sequence[str] = ()) -> UserReader:
    """Loads the function that `FILE.py:FUNCTION` names. This executes the file, like an import.

    Args:
        name: `FILE.py:FUNCTION`.
        reads: files that the reader declares to read. If one of them changes, the reader is loaded again, since it may
            read them at import time.

    Raises:
        RecipeError: if there is no such file or function, or the file raises.
        DataError: if a file of `reads` is missing.
    """
    hashes = [content_hash(files_under(path)) for path in reads]
    reader, code = _loaded.get(name), _hash_code(name, hashes)
    if reader is None or reader.code != code:
        function = _load_function(name)
        _module_files[name] = {}  # resolve again: loading may have imported modules and extended sys.path
        reader = UserReader(name, function, _hash_code(name, hashes))
        _loaded[name] = reader
    return reader


def _hash_code(name: str, hashes: Sequence[str]) -> str:
    _, _, function = name.rpartition(":")
    digest = hashlib.sha256("\n".join([function, *hashes]).encode())
    for module, source in sorted(_find_modules(name).items()):
        digest.update(f"\n{module} {len(source)}\n".encode() + source)
        if _module_files.get(name, {}).get(module) is not None:
            _sources_at_import.setdefault(module, source)
    return digest.hexdigest()[:16]


def _load_function(name: str) -> ReaderFunction:
    path, _, function = name.rpartition(":")
    file = str(local_path(path))
    module = ModuleType(f"nesso_tune_reader_{len(_loaded)}_{Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses and pickle look up the module of a class there
    for imported in _outdated_modules(name):
        sys.modules.pop(imported, None)
        _sources_at_import.pop(imported, None)
    importlib.invalidate_caches()
    try:
        with _no_bytecode():
            exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # user code may raise anything
        what = f"{file} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise RecipeError("format", what, "correct the file") from error
    found = getattr(module, function, None)
    if callable(found):
        user_function: ReaderFunction = found

        @wraps(user_function)
        def without_bytecode(row: dict[str, Any]) -> Any:
            with _no_bytecode():
                return user_function(row)

        return without_bytecode
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    guess = closest(function, names)
    remedy = f"did you mean `{guess}`?" if guess else f"it defines {', '.join(names) or 'none'}"
    raise RecipeError("format", f"{file} has no function `{function}`", remedy)


def _outdated_modules(name: str) -> list[str]:
    """The modules to import again before a reader is loaded: those in its folder, and those that changed.

    A module in the folder may be that of another reader with the same name. If one from elsewhere changed, all of them
    are imported again, since they may hold references to it; otherwise they stay, since the calling program may use
    them.
    """
    file, modules = local_path(reader_file(name)), _find_modules(name)
    siblings = [
        module
        for module in modules
        if module and _sibling(file, module) and (origin := _origin(module)) and not _is_installed(origin)
    ]
    changed = any(
        _sources_at_import[module] != source for module, source in modules.items() if module in _sources_at_import
    )
    return [*siblings, *(_sources_at_import if changed else ())]


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Writes no .pyc files: they would be considered valid if the source changed again within the same second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _find_modules(name: str) -> dict[str, bytes]:
    """The source of a reader's file, under "", and of the user's modules that it imports, directly or indirectly.

    Imports inside functions count. A module is looked up in the reader's folder, then where it was or would be
    imported from. Installed packages are skipped; dynamic imports (`importlib`) are not found.

    Raises:
        RecipeError: if a file cannot be read.
    """
    file = local_path(reader_file(name))
    try:
        found = {"": file.read_bytes()}
        files, folders = _module_files.get(name, {}), _folders_in_strings(file, found[""])
        todo = list(_imports(found[""], ""))
        while todo:
            module = todo.pop()
            if module in found or module.partition(".")[0] in ("nesso_tune", "__main__", "*"):
                continue
            package, _, last = module.rpartition(".")
            if last == "*":  # `__all__` may list any submodule
                path = _module_file(file, package, files, folders)
                todo += [f"{package}.{submodule}" for submodule in _submodules(path)]
            elif (path := _module_file(file, module, files, folders)) is not None:
                found[module] = path.read_bytes()
                todo += _imports(found[module], module if path.name == "__init__.py" else package)
    except OSError as error:
        raise RecipeError("format", f"{error.filename} cannot be read ({error.strerror})", "check the path") from None
    return found


def _module_file(file: Path, module: str, files: ModuleFiles, folders: Sequence[str]) -> Path | None:
    """The file of a user's module that a reader imports, from its folder or elsewhere; None if there is none."""
    if (sibling := _sibling(file, module)) is not None:
        return sibling
    if module not in files:
        files[module] = _user_file(_origin(module) or _find_origin(module, folders))
    return files[module]


def _sibling(file: Path, module: str) -> Path | None:
    """The file of a module in the folder of another file."""
    path = file.parent.joinpath(*module.split("."))
    files = [path / "__init__.py", path.with_name(f"{path.name}.py")]
    return next((found for found in files if found.is_file() and found.resolve() != file.resolve()), None)


def _submodules(path: Path | None) -> list[str]:
    """The names of the modules in the folder of a package."""
    if path is None or path.name != "__init__.py":
        return []
    files = [*path.parent.glob("*.py"), *(folder.parent for folder in path.parent.glob("*/__init__.py"))]
    return sorted(file.stem for file in files if file.name != "__init__.py")


def _user_file(origin: str | None) -> Path | None:
    """The source file of a module, unless it belongs to Python or to an installed package."""
    if origin is None or _is_installed(origin) or not origin.endswith(".py") or not os.access(origin, os.R_OK):
        return None
    return Path(origin)


def _is_installed(origin: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return origin.startswith(_STDLIB) or bool({"site-packages", "dist-packages"} & {*Path(origin).parts})


def _origin(module: str) -> str | None:
    """The file that a module was imported from."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file if isinstance(file, str) else None


def _find_origin(module: str, folders: Sequence[str]) -> str | None:
    """The file that a module would be imported from, without importing anything.

    Args:
        module: full name.
        folders: further folders to search after `sys.path`.
    """
    parts = module.split(".")
    spec = _find_spec(parts[0], None) or _find_spec(parts[0], folders)
    for end in range(2, len(parts) + 1):
        locations = _search_locations(spec)
        spec = _find_spec(".".join(parts[:end]), locations) if locations else None
    return spec.origin if spec is not None and spec.has_location else None


def _find_spec(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:  # includes the finders of editable installs
        try:
            spec = finder.find_spec(module, path)
        except Exception:  # third-party finders may raise anything; the import itself reports the error
            continue
        if spec is not None:
            return spec
    return None


def _search_locations(spec: ModuleSpec | None) -> list[str]:
    """The folders of a package's modules; empty for a module."""
    if spec is None or spec.submodule_search_locations is None:
        return []
    try:
        return list(spec.submodule_search_locations)
    except KeyError:  # a namespace package inside a package that is not imported: it looks up its parent
        return list(getattr(spec.submodule_search_locations, "_path", ()))


def _folders_in_strings(file: Path, source: bytes) -> list[str]:
    """The folders that string literals of a source name: a function may add them to `sys.path` later."""
    texts = {node.value for node in _nodes(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    folders = (os.path.join(file.parent, text) for text in sorted(texts) if text)
    return [folder for folder in folders if os.path.isdir(folder)]


def _imports(source: bytes, package: str) -> Iterator[str]:
    """The modules that a source imports, each preceded by its parent packages; `p.*` for a star import from p."""
    for node in _nodes(source):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
        for name in filter(None, names):
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _nodes(source: bytes) -> Iterator[ast.AST]:
    """All syntax nodes of a source; none if it does not parse."""
    try:
        yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):  # executing it reports the error
        return
