"""Reads YAML files with the line number of every key.

Uses YAML 1.2 (ruamel): `1e-3` is a number, `no` is a string, and duplicate keys are errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from nesso_tune.errors import Problem, RecipeError, shortened

KeyPath = tuple[str | int, ...]  # path of a key: section names, keys and list indices
OVERRIDE = "--set"  # location of values set on the command line
MAX_NODES = 20_000  # guards against exponential alias expansion
MAX_DEPTH = 50
MAX_BYTES = 2_000_000
MAX_NUMBER = 1e300  # larger values, infinity and NaN are kept as text, which validation rejects
PLAIN_TAGS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
TOO_DEEP = ("is too large or nested too deeply", "remove the nested aliases")


@dataclass
class Document:
    """A parsed YAML file.

    Attributes:
        name: name of the file in errors.
        value: nested dicts, lists and scalars.
        lines: the 1-based line of every key and list item, by path from the root.
        problems: duplicate keys.
        is_text: whether it has lines; otherwise it was given as Python data.
        override: location of values that replace those of the file; their line is 0.
    """

    name: str
    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    is_text: bool = True
    override: str = "overrides"

    def where(self, path: KeyPath) -> str:
        """`file:line` of a key, or of its nearest ancestor in the file; the name alone of Python data."""
        if not self.is_text:
            return self.name
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                line = self.lines[path[:end]]
                return f"{self.name}:{line}" if line else self.override
        return f"{self.name}:1"


def read_document(path: Path) -> Document:
    """Reads a YAML file.

    Raises:
        RecipeError: if the file is missing, not text, or not YAML.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(str(path), "no such file", "check the path") from None
    except IsADirectoryError:
        inside = " (this is a run: its recipe is recipe.yaml in it)" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(str(path), f"is a folder{inside}", "name a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(str(path), f"cannot be read ({reason})", "name a readable YAML file") from None
    if len(raw) > MAX_BYTES or path.suffix in (".jsonl", ".parquet"):
        raise RecipeError(
            str(path), f"{len(raw):,} bytes of data are not a recipe", f"make one: nesso-tune init --data {path}"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}", "is not UTF-8 text", "save the file as UTF-8") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """Parses YAML text; see `read_document`."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    try:
        root = yaml.compose(text)
        document = Document(name, None)
        if root is not None:
            document.value = _Builder(document, yaml).build(root, ())
    except MarkedYAMLError as error:
        line, *fault = _explain(error, text)
        raise RecipeError(f"{name}:{line}", *fault) from None
    except RecursionError:
        raise RecipeError(name, *TOO_DEEP) from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(name, f"is not YAML ({str(error).splitlines()[0]})", "correct the file") from None
    return document


def set_value(document: Document, key: str, value: Any) -> None:
    """Sets the value of a dotted key in the document; creates missing sections.

    Raises:
        RecipeError: if a list has no such item.
    """
    if not isinstance(document.value, dict):
        document.value = {}
    node: Any = document.value
    path: KeyPath = ()
    parts = key.split(".")
    where = document.override if document.is_text else document.name
    if len(parts) > MAX_DEPTH:
        raise RecipeError(where, f"`{shortened(key)}` is nested too deeply", "name a key of the recipe")
    for depth, name in enumerate(parts, start=1):
        part: Any = _list_index(node, name, key, where) if isinstance(node, list) else name
        path = (*path, part)
        inner = node[part] if isinstance(node, list) or part in node else None
        if depth < len(parts) and isinstance(inner, (dict, list)):
            node = inner
            continue
        for old in [old for old in document.lines if old[: len(path)] == path]:
            del document.lines[old]
        document.lines[path] = 0
        node[part] = deepcopy(value) if depth == len(parts) else {}
        node = node[part]


def set_values(document: Document, values: Mapping[str, Any], argument: str) -> None:
    """Sets the values of dotted keys that were given as the Python argument of this name; see `set_value`.

    Raises:
        RecipeError: if they are no mapping from keys to values, or a list has no such item.
    """
    remedy = 'write values by dotted key: {"train.learning_rate": 5e-4}'
    if not isinstance(values, Mapping):
        raise RecipeError(argument, f"must be a mapping, not {type(values).__name__}", remedy)
    for key, value in values.items():
        if not isinstance(key, str):
            raise RecipeError(argument, f"the key {key!r} is not text", remedy)
        set_value(document, key, plain_data(value))


def _list_index(items: list[Any], name: str, key: str, where: str) -> int:
    """The list index given by one part of an override's key."""
    if name.isascii() and name.isdigit() and int(name) < len(items):
        return int(name)
    remedy = f"use 0 to {len(items) - 1}" if items else "set the whole list"
    raise RecipeError(where, f"`{shortened(key)}`: there is no item `{shortened(name)}` in this list", remedy)


def plain_data(value: Any, keep_sections: bool = False) -> Any:
    """A copy of Python data as a YAML file would have it.

    Sections become the keys that are set in them (unless they are kept), tuples lists, paths text, and the numbers and
    arrays of NumPy and torch Python's numbers and lists.
    """
    if hasattr(value, "model_dump"):
        return value if keep_sections else value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: plain_data(item, keep_sections) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, keep_sections) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _explain(error: MarkedYAMLError, text: str) -> tuple[int, str, str]:
    """Line of a syntax error, what is wrong, and the remedy."""
    problem = (error.problem or "syntax error").strip()
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    start = error.context_mark.line + 1 if error.context_mark else line  # first line of the enclosing construct
    lines = text.splitlines()
    source_line = lines[line - 1] if line <= len(lines) else ""
    unclosed = "end of stream" in problem or "<stream end>" in problem or problem.startswith("expected ',' or")
    if "\t" in source_line[: len(source_line) - len(source_line.lstrip())] or "'\\t'" in problem:
        return line, "a tab is used for indentation", "indent with spaces"
    if "mapping values are not allowed" in problem or (unclosed and "but got ':'" in problem and line == start):
        remedy = "quote the text, or indent the line like its neighbours"
        return line, "a second `: ` in one line, or wrong indentation", remedy
    if "another document" in problem:
        return line, "a second document starts at `---`", "keep one document in the file"
    if unclosed:
        return start, "a bracket or quote that opens here is not closed, or a comma is missing", "close it"
    if "could not find expected ':'" in problem:
        return start, "a key without a colon", "write `key: value`"
    return line, f"not YAML: {problem}", "correct the line"


class _Composer(Composer):
    """Composer that stops at `MAX_NODES`, before an oversized file is fully composed."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > 2 * MAX_NODES:  # keys count as nodes
            raise RecursionError
        return super().compose_node(parent, index)


class _Builder:
    """Converts YAML nodes to plain data and records the line of each key."""

    def __init__(self, document: Document, yaml: YAML) -> None:
        self.document = document
        self.yaml = yaml
        self.nodes = 0

    def build(self, node: Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise RecipeError(self.document.name, *TOO_DEEP)
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if str(node.tag).removeprefix("tag:yaml.org,2002:") not in PLAIN_TAGS:
            where = f"{self.document.name}:{node.start_mark.line + 1}"
            raise RecipeError(
                where, f"the tag `{shortened(str(node.tag))}` is not supported", "remove it: values are plain data"
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, ScalarNode) else None
            line = key_node.start_mark.line + 1
            where = f"{self.document.name}:{line}"
            if str(key_node.tag).endswith(":merge"):
                raise RecipeError(where, "merge keys (`<<`) are not supported", "write the merged keys out")
            if key is None:
                raise RecipeError(where, "this key cannot be used", "write plain text keys")
            key = key if isinstance(key, str) else str(key_node.value)
            here = (*path, key)
            if key in out:
                first = self.document.lines[here]
                dotted = ".".join(shortened(str(part)) for part in here)
                duplicate = Problem(where, f"`{dotted}` is given twice (first in line {first})", "keep one")
                self.document.problems.append(duplicate)
                continue
            self.document.lines[here] = line
            out[key] = self.build(value_node, here)
        return out

    def _scalar(self, node: Node) -> Any:
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("int", "float", "bool", "null"):
            return node.value  # strings; timestamps and binary data stay text
        try:
            value = self.yaml.constructor.construct_object(node)
        except (ValueError, LookupError):  # `!!int abc`, or more digits than `int` accepts
            return node.value
        return value if value is None or abs(value) < MAX_NUMBER else node.value
