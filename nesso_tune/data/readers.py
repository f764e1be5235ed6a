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
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from nesso_tune.data.files import content_hash, files_under
from nesso_tune.errors import RecipeError, first_line
from nesso_tune.recipes.names import closest

PYTHON = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


@dataclass(frozen=True)
class OwnReader:
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


_loaded: dict[str, OwnReader] = {}


def is_reader(name: str) -> bool:
    """Whether a source's `format` names a function."""
    return ".py:" in name


def load_reader(name: str, reads: Sequence[str] = ()) -> OwnReader:
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
        known = OwnReader(name, _function(name), _code(name, read))  # again: now it is known what was imported
        _loaded[name] = known
    return known


def _code(name: str, read: Sequence[str]) -> str:
    file, _, function = name.rpartition(":")
    try:
        modules = _modules(Path(file))
    except OSError as error:
        raise RecipeError("format", f"{file} cannot be read ({error.strerror})", "check the path") from None
    digest = hashlib.sha256("\n".join([function, *read]).encode())
    for module, source in sorted(modules.items()):
        digest.update(f"\n{module} {len(source)}\n".encode() + source)
    return digest.hexdigest()[:16]


def _modules(file: Path) -> dict[str, bytes]:
    """The source of a Python file, under "", and of the modules that it imports, also inside functions.

    Those beside it are found by their names, others where they were imported from. Installed packages are left out;
    what is not imported by name (`importlib`) is not found.
    """
    found = {"": file.read_bytes()}
    todo = list(_imported(found[""], ""))
    while todo:
        name = todo.pop()
        if name in found or name.partition(".")[0] == "nesso_tune":
            continue
        module, source = _beside(file, name), None
        if module is not None:
            source = module.read_bytes()
        elif (elsewhere := _file_of(name)) is not None:
            module, source = Path(elsewhere), _as_imported(elsewhere)
        if module is not None and source is not None:
            found[name] = source
            todo += _imported(source, name if module.name == "__init__.py" else name.rpartition(".")[0])
    return found


def _beside(file: Path, name: str) -> Path | None:
    """The file of a module in the folder of another one."""
    path = file.parent.joinpath(*name.split("."))
    files = [path / "__init__.py", path.with_name(f"{path.name}.py")]
    return next((module for module in files if module.is_file() and module.resolve() != file.resolve()), None)


def _file_of(name: str) -> str | None:
    """Where a module was imported from, unless it is part of Python or of an installed package."""
    file = getattr(sys.modules.get(name), "__file__", None)
    installed = file is None or file.startswith(PYTHON) or {"site-packages", "dist-packages"} & {*Path(file).parts}
    return None if installed or not str(file).endswith(".py") else file


@lru_cache(maxsize=1024)
def _as_imported(file: str) -> bytes | None:
    """The source of a module as it was when it was first asked for: a later change does not reach this process."""
    try:
        return Path(file).read_bytes()
    except OSError:
        return None


def _imported(source: bytes, package: str) -> Iterator[str]:
    """The modules that a source names in its imports, with the packages that they are in; none if it does not parse."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # running it says what is wrong
        return
    for node in ast.walk(tree):
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
    for imported in _modules(Path(file)):  # anew: it may have changed, or be that of another reader's folder
        if imported and _beside(Path(file), imported) is not None and _file_of(imported) is not None:
            del sys.modules[imported]
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be taken for current for a second
    try:
        exec(compile(Path(file).read_bytes(), file, "exec"), vars(module))
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        what = f"{file} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise RecipeError("format", what, "correct the file") from error
    finally:
        sys.dont_write_bytecode = before
    found = getattr(module, function, None)
    if callable(found):
        made: Callable[[dict[str, Any]], Any] = found
        return made
    names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
    guess = closest(function, names)
    remedy = f"did you mean `{guess}`?" if guess else f"it has {', '.join(names) or 'none'}"
    raise RecipeError("format", f"{file} has no function `{function}`", remedy)
