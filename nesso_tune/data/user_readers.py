"""Readers of a user's own: a function in a Python file that makes a row of a known shape of any row.

A recipe names it as `format: readers.py:faq`. The function gets a row as a dict and returns a dict of a shape that is
known (`messages`; `prompt` and `response`; `prompt`, `chosen` and `rejected`; `text`; `input_ids` and `labels`), a
Conversation or a PreferencePair, or None for a row that is to be left out:

    def faq(row):
        return {"prompt": row["q"], "response": row["answers"][0]}
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
from nesso_tune.recipes.builtin import reader_file

Places = dict[str, Path | None]  # where modules that are not beside a reader come from; None: not a user's own
PYTHON = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


@dataclass(frozen=True)
class UserReader:
    """A function of a user's that reads rows.

    Attributes:
        name: as the recipe names it.
        function: gets a row, returns a row of a known shape, a Conversation, a PreferencePair, or None.
        code: hash of its name, of the file that it stands in, of what that imports of the user's, and of the files that
            it is said to read.
    """

    name: str
    function: Callable[[dict[str, Any]], Any]
    code: str


_loaded: dict[str, UserReader] = {}
_places: dict[str, Places] = {}  # of a reader that is loaded: what was found then, so that reading rows changes nothing
_as_imported: dict[str, bytes] = {}  # modules that are not beside a reader, as they were when they were first asked for


def is_user_reader(name: str) -> bool:
    """Whether a source's `format` names a function."""
    return ".py:" in name


def load_user_reader(name: str, reads: Sequence[str] = ()) -> UserReader:
    """The function that `FILE.py:FUNCTION` names. Its file is run, as any Python file that is imported.

    Args:
        name: `FILE.py:FUNCTION`.
        reads: the files that the source says it reads. The file is run again if one of them changes, since it may
            read them when it is loaded.

    Raises:
        RecipeError: if there is no such file or function, or the file raises.
        DataError: if a file of `reads` is missing.
    """
    read = [content_hash(files_under(path)) for path in reads]
    known, code = _loaded.get(name), _code(name, read)
    if known is None or known.code != code:
        function = _function(name)
        _places[name] = {}  # again: now it is known what was imported, and what folders can be imported from
        known = UserReader(name, function, _code(name, read))
        _loaded[name] = known
    return known


def _code(name: str, read: Sequence[str]) -> str:
    _, _, function = name.rpartition(":")
    digest = hashlib.sha256("\n".join([function, *read]).encode())
    for module, source in sorted(_modules(name).items()):
        digest.update(f"\n{module} {len(source)}\n".encode() + source)
        if _places.get(name, {}).get(module) is not None:
            _as_imported.setdefault(module, source)
    return digest.hexdigest()[:16]


def _modules(name: str) -> dict[str, bytes]:
    """The source of a reader's file, under "", and of the modules that it imports, also inside functions.

    Those beside it are found by their names, others where they were imported from or would be. Installed packages are
    left out; what is not imported by name (`importlib`) is not found.

    Raises:
        RecipeError: if a file cannot be read.
    """
    file = Path(reader_file(name))
    try:
        found = {"": file.read_bytes()}
        places, folders = _places.get(name, {}), _named_folders(file, found[""])
        todo = list(_imported(found[""], ""))
        while todo:
            module = todo.pop()
            if module in found or module.partition(".")[0] in ("nesso_tune", "__main__", "*"):
                continue
            package, _, last = module.rpartition(".")
            if last == "*":  # its `__all__` may name any of them
                place = _place(file, package, places, folders)
                todo += [f"{package}.{inside}" for inside in _inside(place)]
            elif (place := _place(file, module, places, folders)) is not None:
                found[module] = place.read_bytes()
                todo += _imported(found[module], module if place.name == "__init__.py" else package)
    except OSError as error:
        raise RecipeError("format", f"{error.filename} cannot be read ({error.strerror})", "check the path") from None
    return found


def _place(file: Path, module: str, places: Places, folders: Sequence[str]) -> Path | None:
    """The file of a module of the user's that a reader imports, from beside it or from elsewhere; None if not known."""
    if (beside := _beside(file, module)) is not None:
        return beside
    if module not in places:
        places[module] = _own(_loaded_from(module) or _importable(module, folders))
    return places[module]


def _inside(place: Path | None) -> list[str]:
    """The modules in the folder of a package."""
    if place is None or place.name != "__init__.py":
        return []
    files = [*place.parent.glob("*.py"), *(folder.parent for folder in place.parent.glob("*/__init__.py"))]
    return sorted(file.stem for file in files if file.name != "__init__.py")


def _beside(file: Path, name: str) -> Path | None:
    """The file of a module in the folder of another one."""
    path = file.parent.joinpath(*name.split("."))
    files = [path / "__init__.py", path.with_name(f"{path.name}.py")]
    return next((module for module in files if module.is_file() and module.resolve() != file.resolve()), None)


def _loaded_from(module: str) -> str | None:
    """Where a module was imported from."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file if isinstance(file, str) else None


def _own(file: str | None) -> Path | None:
    """The source of a module, unless it is part of Python or of an installed package."""
    installed = file is None or file.startswith(PYTHON) or {"site-packages", "dist-packages"} & {*Path(file).parts}
    return None if installed or not str(file).endswith(".py") or not os.access(str(file), os.R_OK) else Path(str(file))


def _importable(module: str, folders: Sequence[str]) -> str | None:
    """Where a module would be imported from. Nothing is imported.

    Args:
        module: with the packages that it is in.
        folders: where to look for it besides.
    """
    parts = module.split(".")
    spec = _spec(parts[0], None) or _spec(parts[0], folders)
    for end in range(2, len(parts) + 1):
        inside = _search(spec)
        spec = _spec(".".join(parts[:end]), inside) if inside else None
    return spec.origin if spec is not None and spec.has_location else None


def _spec(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:  # those of editable installs are among them
        try:
            spec = finder.find_spec(module, path)
        except Exception:  # finders are anyone's; the import itself says what is wrong
            continue
        if spec is not None:
            return spec
    return None


def _search(spec: ModuleSpec | None) -> list[str]:
    """The folders that the modules of a package are in; none for a module."""
    if spec is None or spec.submodule_search_locations is None:
        return []
    try:
        return list(spec.submodule_search_locations)
    except KeyError:  # a folder without __init__.py in a package that is not imported: it asks that one
        return list(getattr(spec.submodule_search_locations, "_path", ()))


def _named_folders(file: Path, source: bytes) -> list[str]:
    """The folders that a source names as text, which it may import from once a function of it has run."""
    texts = {node.value for node in _nodes(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    folders = (os.path.join(file.parent, text) for text in sorted(texts) if text)
    return [folder for folder in folders if os.path.isdir(folder)]


def _nodes(source: bytes) -> Iterator[ast.AST]:
    """All of a source; nothing if it does not parse."""
    try:
        yield from ast.walk(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError):  # running it says what is wrong
        return


def _imported(source: bytes, package: str) -> Iterator[str]:
    """The modules that a source names in its imports, with the packages they are in; `p.*` for all of a package."""
    for node in _nodes(source):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*above, node.module]))
            names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
        for name in filter(None, names):
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _function(name: str) -> Callable[[dict[str, Any]], Any]:
    file, _, function = name.rpartition(":")
    module = ModuleType(f"nesso_tune_reader_{len(_loaded)}_{Path(file).stem}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # so that what it defines can be found again, e.g. by dataclasses
    for imported in _outdated(name):
        sys.modules.pop(imported, None)
        _as_imported.pop(imported, None)
    importlib.invalidate_caches()
    try:
        with _no_bytecode():
            exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        what = f"{file} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise RecipeError("format", what, "correct the file") from error
    found = getattr(module, function, None)
    if callable(found):
        made: Callable[[dict[str, Any]], Any] = found

        @wraps(made)
        def function_of_row(row: dict[str, Any]) -> Any:
            with _no_bytecode():
                return made(row)

        return function_of_row
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    guess = closest(function, names)
    remedy = f"did you mean `{guess}`?" if guess else f"it has {', '.join(names) or 'none'}"
    raise RecipeError("format", f"{file} has no function `{function}`", remedy)


def _outdated(name: str) -> list[str]:
    """The modules that a reader has to import anew: those beside it, which may be another reader's, and those changed.

    One that changed takes all from elsewhere along, since they may hold what it was. Otherwise these stay, as they may
    be in use by a program that called this.
    """
    file, modules = Path(reader_file(name)), _modules(name)
    beside = [module for module in modules if module and _beside(file, module) and _own(_loaded_from(module))]
    changed = any(_as_imported[module] != source for module, source in modules.items() if module in _as_imported)
    return [*beside, *(_as_imported if changed else ())]


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Writes no compiled code of what is imported: it would be taken for current if the source changed in a second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
