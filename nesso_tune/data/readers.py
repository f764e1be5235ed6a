"""Readers of a user's own: a function in a Python file that makes a row of a known shape of any row.

A recipe names it as `format: readers.py:faq`. The function gets a row as a dict and returns a dict of a shape that is
known (`messages`; `prompt` and `response`; `prompt`, `chosen` and `rejected`; `text`; `input_ids` and `labels`), a
Conversation or a PreferencePair, or None for a row that is to be left out:

    def faq(row):
        return {"prompt": row["q"], "response": row["answers"][0]}
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nesso_tune.errors import RecipeError, first_line
from nesso_tune.recipes.names import closest


@dataclass(frozen=True)
class OwnReader:
    """A function of a user's that reads rows.

    Attributes:
        name: as the recipe names it.
        function: gets a row, returns a row of a known shape, a Conversation, a PreferencePair, or None.
        code: hash of the file that it stands in.
    """

    name: str
    function: Callable[[dict[str, Any]], Any]
    code: str


def is_reader(name: str) -> bool:
    """Whether a source's `format` names a function."""
    return ".py:" in name


@lru_cache(maxsize=32)
def _load(name: str, code: str) -> OwnReader:
    file, _, function = name.rpartition(":")
    module_name = f"nesso_tune_reader_{code}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None, "a name that ends with .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that what it defines can be found again, e.g. by dataclasses
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        what = f"{file} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise RecipeError("format", what, "correct the file") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        guess = closest(function, names)
        remedy = f"did you mean `{guess}`?" if guess else f"it has {', '.join(names) or 'none'}"
        raise RecipeError("format", f"{file} has no function `{function}`", remedy)
    return OwnReader(name, found, code)


def load_reader(name: str) -> OwnReader:
    """The function that `FILE.py:FUNCTION` names. Its file is run, as any Python file that is imported.

    Raises:
        RecipeError: if there is no such file or function, or the file raises.
    """
    file = Path(name.rpartition(":")[0])
    try:
        code = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RecipeError("format", f"{file} cannot be read ({error.strerror})", "check the path") from None
    return _load(name, code)
