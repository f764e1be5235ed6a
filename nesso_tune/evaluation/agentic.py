"""Function calling: a tolerant parser of tool calls, and one grader for each category of cases.

The format of a case is that of the agentic suite of Nesso: `{"id", "lang", "cat", "messages", "spec"}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nesso_tune.conversation import Conversation, Message, language_code
from nesso_tune.data.tools import Tool, read_tool_file
from nesso_tune.evaluation.prompts import Row, answer_all, tool_path
from nesso_tune.evaluation.results import AnsweredPrompt, TaskResult, means_by_group
from nesso_tune.evaluation.suites import Task
from nesso_tune.generation.answers import Answer, is_in_language
from nesso_tune.generation.inference import ChatModel

MAX_NEW_TOKENS = 512
BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
NAME = re.compile(r'"name"\s*:\s*"([^"\n]+)"')
BARE_NAME = re.compile(r'\{\s*"name"\s*:\s*"([^"\n]+)"\s*,\s*"arguments"')
MIN_ANSWER = 2  # letters or digits of a real answer
JSON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A tool call; the arguments are None if they are not valid JSON."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclass(frozen=True)
class ParsedAnswer:
    """The tool calls of an answer, and its text without them."""

    calls: tuple[Call, ...]
    text: str

    @property
    def names(self) -> list[str]:
        """Names of the called tools, in order."""
        return [call.name for call in self.calls]

    @property
    def is_real(self) -> bool:
        """Whether there is a text besides the calls."""
        return sum(map(str.isalnum, self.text)) >= MIN_ANSWER


def parse_answer(answer: str) -> ParsedAnswer:
    """Reads tool calls as leniently as their intention is clear.

    In `<tool_call>` blocks, closed or not, of invalid JSON the name is still read. Without blocks, a JSON object with
    `name` and `arguments` is a call, wherever it stands.
    """
    blocks = BLOCK.findall(answer)
    if blocks:
        calls = [call for block in blocks for call in _calls_in_block(block)]
        return ParsedAnswer(tuple(calls), BLOCK.sub(" ", answer).strip())
    calls, rest = [], answer
    for value, text in _json_values(answer):
        found = list(_calls(value, bare=True))
        calls += found
        rest = rest.replace(text, " ") if found else rest
    for name in BARE_NAME.findall(rest):  # the JSON of this one is invalid
        calls.append(Call(name, None))
        rest = rest[: BARE_NAME.search(rest).start()]  # type: ignore[union-attr]
    return ParsedAnswer(tuple(calls), rest.strip())


def _calls_in_block(block: str) -> list[Call]:
    calls = [call for value, _ in _json_values(block) for call in _calls(value)]
    return calls or [Call(name, None) for name in NAME.findall(block)[:1]]


def _json_values(text: str) -> Iterator[tuple[Any, str]]:
    """The JSON objects and arrays in a text from left to right, each with its text."""
    decoder, start = json.JSONDecoder(), 0
    while found := re.compile(r"[\[{]").search(text, start):
        try:
            value, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError):
            start = found.start() + 1
            continue
        yield value, text[found.start() : end]
        start = end


def _calls(value: Any, bare: bool = False) -> Iterator[Call]:
    """The calls in a JSON value; a `bare` one, without tags, needs arguments too."""
    if isinstance(value, list):
        for item in value:
            yield from _calls(item, bare)
        return
    if not isinstance(value, dict):
        return
    inner = value["function"] if isinstance(value.get("function"), dict) else value
    name, arguments = inner.get("name"), inner.get("arguments", inner.get("parameters", {}))
    if not isinstance(name, str) or not name or (bare and "arguments" not in inner):
        return
    if isinstance(arguments, str):  # JSON in a string, as OpenAI writes it
        with suppress(ValueError):
            arguments = json.loads(arguments)
    yield Call(name, arguments if isinstance(arguments, dict) else None)


# Cases


@dataclass(frozen=True)
class Case:
    """A conversation that ends with a user or tool turn, and what the answer must do.

    Attributes:
        id: of the case.
        language: code.
        category: name of the grader.
        messages: the conversation.
        spec: what the grader needs, as in the file.
    """

    id: str
    language: str
    category: str
    messages: tuple[Message, ...]
    spec: Mapping[str, Any]


def parse_row(row: Row) -> Case | None:
    """A case; None for a row of another format.

    Raises:
        KeyError, TypeError, ValueError: if a case is incomplete, or its category is unknown.
    """
    if "cat" not in row and "spec" not in row:
        return None
    category, spec = row["cat"], row["spec"] if isinstance(row["spec"], dict) else {}
    if category not in GRADERS:
        raise ValueError(f"unknown category `{category}`; use {', '.join(GRADERS)}")
    for key in NEEDED.get(category, ()):
        spec[key]
    messages = tuple(Message(str(turn["role"]), str(turn["content"])) for turn in row["messages"])
    code = language_code(str(row["lang"]))
    if not messages or code is None:
        raise ValueError("has no messages" if code else f"unknown language `{row['lang']}`")
    return Case(str(row["id"]), code, category, messages, spec)


# Graders

Grader = Callable[[ParsedAnswer, Mapping[str, Any]], bool]


def _calls_exactly(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    """The set of called tools and the number of calls are as given."""
    return set(answer.names) == set(spec["tools"]) and len(answer.calls) == int(spec["n"])


def _has_all_arguments(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    tool, keys = spec["argkeys"]
    given = [call.arguments or {} for call in answer.calls if call.name == tool]
    return _calls_exactly(answer, spec) and all(set(keys) <= set(arguments) for arguments in given)


def _makes_nothing_up(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    """No call of the tool has a value for a field that the user did not give."""
    values = [(call.arguments or {}).get(spec["fabricate_field"]) for call in answer.calls if call.name == spec["tool"]]
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in values)


def _calls_nothing(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    return not answer.calls


def _answers_itself(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    return not answer.calls and answer.is_real


def _uses_observation(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    return _answers_itself(answer, spec) and _has_gold(answer, spec)


def _has_gold(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    return str(spec.get("gold") or "").casefold() in answer.text.casefold()


def _calls_next(answer: ParsedAnswer, spec: Mapping[str, Any]) -> bool:
    return spec["next"] in answer.names


GRADERS: Mapping[str, Grader] = {
    "single": _calls_exactly,
    "par_same": _calls_exactly,
    "par_diff": _calls_exactly,
    "disamb": _calls_exactly,
    "multiarg": _has_all_arguments,
    "missing": _makes_nothing_up,
    "unavail": _calls_nothing,
    "notool": _answers_itself,
    "obs": _uses_observation,
    "multistep": _calls_next,
}
NEEDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("single", "par_same", "par_diff", "disamb"), ("tools", "n")),
    "multiarg": ("tools", "n", "argkeys"),
    "missing": ("tool", "fabricate_field"),
    "multistep": ("next",),
}  # keys of `spec`


def passes(case: Case, answer: ParsedAnswer) -> bool:
    """The verdict of the case's category."""
    return GRADERS[case.category](answer, case.spec)


def passes_strictly(case: Case, answer: ParsedAnswer, tools: Sequence[Tool]) -> bool:
    """The verdict with arguments: every call fits the schema of its tool, and the values given in `spec` are right.

    `intarg: [tool, key, value]` gives one value, `args: {tool: {key: value}}` several; a list holds alternatives. A
    question without a tool must contain its `gold` too.
    """
    schemas = {_function(tool)["name"]: _function(tool).get("parameters") or {} for tool in tools}
    wanted = {tool: dict(values) for tool, values in (case.spec.get("args") or {}).items()}
    if intarg := case.spec.get("intarg"):
        wanted.setdefault(intarg[0], {})[intarg[1]] = intarg[2]
    return (
        passes(case, answer)
        and _has_gold(answer, case.spec)
        and all(call.name in schemas and _fits(call.arguments, schemas[call.name]) for call in answer.calls)
        and all(_is_right((call.arguments or {}).get(key), value)
                for call in answer.calls for key, value in wanted.get(call.name, {}).items())
    )  # fmt: skip


def _function(tool: Tool) -> Mapping[str, Any]:
    inner: Mapping[str, Any] = tool.get("function", tool)
    return inner


def _fits(arguments: Mapping[str, Any] | None, schema: Mapping[str, Any]) -> bool:
    """Whether arguments are valid JSON with the required keys, no others, and values of the declared types."""
    properties = schema.get("properties") or {}
    if arguments is None or not set(schema.get("required") or ()) <= set(arguments) <= set(properties):
        return False
    return all(_has_type(value, properties[key].get("type")) for key, value in arguments.items())


def _has_type(value: Any, name: Any) -> bool:
    if not isinstance(name, str) or name not in JSON_TYPES:
        return True
    return isinstance(value, JSON_TYPES[name]) and isinstance(value, bool) == (name == "boolean")


def _is_right(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return any(_is_right(value, one) for one in wanted)
    if isinstance(value, str) and isinstance(wanted, str):
        return value.strip().casefold() == wanted.strip().casefold()
    return type(value) in (type(wanted), int, float) and value == wanted


# The task


def run(task: Task, cases: Sequence[Case], model: ChatModel) -> TaskResult:
    """Greedy answers of a model to all cases, and their verdicts."""
    tools = read_tool_file(tool_path(task))
    conversations = [Conversation(case.messages, tools, case.language) for case in cases]
    return score(cases, answer_all(model, conversations, task.max_new_tokens or MAX_NEW_TOKENS), tools)


def score(cases: Sequence[Case], answers: Sequence[Answer], tools: Sequence[Tool]) -> TaskResult:
    """`passed` and `passed_strict`, in total, by category and by language; `stop_rate`; and `language_fidelity` of
    answers without calls.
    """
    parsed = [parse_answer(answer.text) for answer in answers]
    passed = [passes(case, answer) for case, answer in zip(cases, parsed, strict=True)]
    strict = [passes_strictly(case, answer, tools) for case, answer in zip(cases, parsed, strict=True)]
    groups = [lambda i: cases[i].category, lambda i: cases[i].language]
    fidelity = [
        None if answer.calls else is_in_language(answer.text, case.language, "")
        for case, answer in zip(cases, parsed, strict=True)
    ]
    metrics = {
        **means_by_group("passed", passed, groups),
        **means_by_group("passed_strict", strict, groups),
        **means_by_group("stop_rate", [answer.stopped for answer in answers]),
        **means_by_group("language_fidelity", fidelity),
    }
    shown = tuple(
        AnsweredPrompt(case.id, case.language, case.messages[0].content, answer.text, answer.stopped, verdict)
        for case, answer, verdict in zip(cases, answers, passed, strict=True)
    )
    return TaskResult(metrics, shown)
