"""Conversion of rows to conversations and pairs, or the reason why they cannot be used."""

import json

import pytest

from nesso_tune import Message
from nesso_tune.data.convert import Unusable, record_language, to_conversation, to_pair
from nesso_tune.data.formats import load_format
from nesso_tune.recipes.sections import Source

MESSAGES, SHAREGPT, ALPACA, PREFERENCE = map(load_format, ("messages", "sharegpt", "alpaca", "preference"))


def said(*contents, **last):
    """Alternating user and assistant messages, as in a row; `last` changes the last one."""
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    turns[-1].update(last)
    return turns


def turns_of(conversation):
    return [(m.role, m.content) for m in conversation.messages]


TURNS = [("user", "a"), ("assistant", "b")]
USABLE = {
    "messages": (MESSAGES, {"messages": said("a", "b")}, TURNS),
    "extra keys": (MESSAGES, {"messages": said("a", "b", id=7, weight=None), "x": [1]}, TURNS),
    "developer": (
        MESSAGES, {"messages": [{"role": "developer", "content": "s"}, *said("a", "b")]},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "system column": (
        MESSAGES, {"messages": said("a", "b"), "system": "s"}, [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "blank system column": (MESSAGES, {"messages": said("a", "b"), "system": " "}, TURNS),
    "empty user turn": (MESSAGES, {"messages": said("", "b")}, [("user", ""), ("assistant", "b")]),
    "no tools": (MESSAGES, {"messages": said("a", "b", tool_calls=None), "tools": []}, TURNS),
    "sharegpt": (
        SHAREGPT, {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        TURNS,
    ),
    "alpaca": (ALPACA, {"instruction": "a", "input": "", "output": "b"}, TURNS),
    "alpaca with input": (
        ALPACA, {"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")],
    ),
    "alpaca without input": (ALPACA, {"prompt": "a", "input": None, "response": "b"}, TURNS),
    "text in parts": (
        MESSAGES, {"messages": said([{"type": "text", "text": "a"}], [{"text": "b"}, {"type": "text", "text": ""}])},
        TURNS,
    ),
    "text is kept exactly": (MESSAGES, {"messages": said(" a\n", "\tb ")}, [("user", " a\n"), ("assistant", "\tb ")]),
}  # fmt: skip


@pytest.mark.parametrize(("data_format", "row", "turns"), USABLE.values(), ids=USABLE)
def test_conversations(data_format, row, turns):
    conversation = to_conversation(row, data_format, "it", "x.jsonl")
    assert turns_of(conversation) == turns
    assert (conversation.language, conversation.source) == ("it", "x.jsonl")


def test_roles_of_a_source_extend_those_of_the_format_ignoring_case():
    data_format = MESSAGES.adapted(Source(path="x", roles={"Doc": "assistant", "ai": "user"}))
    row = {"messages": [{"role": role, "content": "x"} for role in ("System", "ai", "Doc", "Utente", "ASSISTENTE")]}
    roles = [m.role for m in to_conversation(row, data_format, "it", "").messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_messages_as_json_text():
    row = {"messages": json.dumps(said("a", "b"))}
    assert turns_of(to_conversation(row, MESSAGES, "it", "")) == TURNS
    with pytest.raises(Unusable, match="no_messages"):
        to_conversation({"messages": "[{"}, MESSAGES, "it", "")


def test_reasons_quote_the_data():
    for row, detail in (
        ({"messages": said("a", "b", role="narrator")}, "`narrator`"),
        ({"messages": said(3, "b")}, "int"),
        ({"text": "a"}, "no messages or conversation or conversations or dialogue or turns or contents in text"),
    ):
        with pytest.raises(Unusable) as why:
            to_conversation(row, MESSAGES, "it", "")
        assert why.value.detail == detail


def test_names_and_train_flags_are_kept():
    row = {
        "messages": [
            {"role": "user", "content": "a", "name": "Ada"},
            {"role": "assistant", "content": "b", "train": False},
        ]
    }
    user, assistant = to_conversation(row, MESSAGES, "it", "").messages
    assert user == Message("user", "a", name="Ada")
    assert assistant == Message("assistant", "b", train=False)


UNUSABLE = {
    "no column": ({}, "missing_field"),
    "null": ({"messages": None}, "missing_field"),
    "empty": ({"messages": []}, "no_messages"),
    "text": ({"messages": "hello"}, "no_messages"),
    "object": ({"messages": {"role": "user", "content": "a"}}, "no_messages"),
    "nested lists": ({"messages": [said("a", "b")]}, "message_not_an_object"),
    "texts": ({"messages": ["a", "b"]}, "message_not_an_object"),
    "role missing": ({"messages": [{"content": "a"}]}, "missing_field"),
    "role unknown": ({"messages": said("a", "b", role="narrator")}, "unknown_role"),
    "role true": ({"messages": said("a", "b", role=True)}, "unknown_role"),
    "role list": ({"messages": said("a", "b", role=["assistant"])}, "unknown_role"),
    "content missing": ({"messages": [{"role": "user"}]}, "missing_field"),
    "content null": ({"messages": said("a", None)}, "missing_field"),
    "content number": ({"messages": said(3, "b")}, "content_not_text"),
    "content object": ({"messages": said("a", {"text": "b"})}, "content_not_text"),
    "an image": ({"messages": said([{"type": "image_url", "image_url": {}}], "b")}, "content_part_not_text"),
    "a part without text": ({"messages": said([{"type": "text", "content": "a"}], "b")}, "content_not_text"),
    "texts in a list": ({"messages": said(["a"], "b")}, "content_not_text"),
    "lone surrogate": ({"messages": said("a", "\ud800")}, "invalid_unicode"),
    "user alone": ({"messages": said("a")}, "no_assistant_turn"),
    "empty answer": ({"messages": said("a", " \n")}, "empty_answer"),
    "one of two answers empty": ({"messages": said("a", "b", "c", "")}, "empty_answer"),
    "train not a bool": ({"messages": said("a", "b", train=1)}, "train_not_true_or_false"),
    "call by the user": ({"messages": said("a", tool_calls=[{"name": "f"}])}, "tool_call_not_by_assistant"),
    "call without name": ({"messages": said("a", "b", tool_calls=[{"arguments": {}}])}, "tool_call_not_readable"),
    "call with a list": (
        {"messages": said("a", "b", tool_calls=[{"name": "f", "arguments": [1]}])},
        "tool_call_not_readable",
    ),
    "call that is no JSON": (
        {"messages": said("a", "b", tool_calls=[{"name": "f", "arguments": "{"}])},
        "tool_call_not_readable",
    ),
    "call with a surrogate": (
        {"messages": said("a", "b", tool_calls='[{"name": "\\ud800"}]')},
        "tool_call_not_readable",
    ),
    "call with bytes": (
        {"messages": said("a", "b", tool_calls=[{"name": "f", "arguments": {"a": b"x"}}])},
        "tool_call_not_readable",
    ),
    "call with a surrogate inside": (
        {"messages": said("a", "b", tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}])},
        "tool_call_not_readable",
    ),
    "tools with a surrogate": (
        {"messages": said("a", "b"), "tools": [{"name": "f", "description": "\udfff"}]},
        "tools_not_readable",
    ),
    "tools that are no JSON": ({"messages": said("a", "b"), "tools": "[{"}, "tools_not_readable"),
    "tools that are numbers": ({"messages": said("a", "b"), "tools": [1]}, "tools_not_readable"),
    "tools with a key twice": (
        {"messages": said("a", "b"), "tools": '[{"name": "f", "name": "g"}]'},
        "tools_not_readable",
    ),
    "Python's tools with a key twice": (
        {"messages": said("a", "b"), "tools": "[{'name': 'f', 'parameters': {'a': {}, 'a': None}}]"},
        "tools_not_readable",
    ),
    "call with an argument twice": (
        {"messages": said("a", "b", tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}])},
        "tool_call_not_readable",
    ),
    "tool without name": ({"messages": said("a", "b"), "tools": [{"description": "x"}]}, "tool_without_name"),
    "system surrogate": ({"messages": said("a", "b"), "system": "x\udfff"}, "invalid_unicode"),
}


@pytest.mark.parametrize(("row", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_why_a_conversation_cannot_be_used(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        to_conversation(row, MESSAGES, "it", "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [({"instruction": "a"}, "missing_field"), ({"instruction": "a", "output": None}, "missing_field"),
     ({"instruction": ["a"], "output": "b"}, "content_not_text"), ({"instruction": "a", "output": ""}, "empty_answer"),
     ({"instruction": "a", "input": {}, "output": "b"}, "content_not_text")],
)  # fmt: skip
def test_why_an_instruction_cannot_be_used(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        to_conversation(row, ALPACA, "it", "")


def sharegpt(*turns):
    """A sharegpt conversation of (role, value) pairs."""
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


CALL = {"name": "f", "arguments": {"b": 1, "a": [2]}}
ASK, USE, ANSWER = ("human", "q"), ("function_call", json.dumps(CALL)), ("observation", "r")
CALLS = {
    "sharegpt": (SHAREGPT, sharegpt(ASK, USE, ANSWER, ("gpt", "w")), [("", (CALL,)), ("w", ())]),
    "after words": (SHAREGPT, sharegpt(ASK, ("gpt", "w"), USE, ANSWER), [("w", (CALL,))]),
    "in a row": (SHAREGPT, sharegpt(ASK, USE, USE, ANSWER), [("", (CALL, CALL))]),
    "a list": (SHAREGPT, sharegpt(ASK, ("function_call", json.dumps([CALL, CALL]))), [("", (CALL, CALL))]),
    "openai": (MESSAGES, {"messages": said("q", None, tool_calls=[{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": json.dumps(CALL["arguments"])}}])}, [("", (CALL,))]),
    "flat": (MESSAGES, {"messages": said("q", "w", tool_calls=[CALL])}, [("w", (CALL,))]),
    "parameters": (MESSAGES, {"messages": said("q", "", tool_calls=[{"function": {"name": "f", "parameters":
                   CALL["arguments"]}}])}, [("", (CALL,))]),
    "not learned alike": (SHAREGPT, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "w"},
                          {"from": "function_call", "value": json.dumps(CALL), "train": False}]},
                          [("w", ()), ("", (CALL,))]),
    "no arguments": (MESSAGES, {"messages": said("q", "", tool_calls=[{"name": "f"}])},
                     [("", ({"name": "f", "arguments": {}},))]),
}  # fmt: skip


@pytest.mark.parametrize(("data_format", "row", "answers"), CALLS.values(), ids=CALLS)
def test_tool_calls(data_format, row, answers):
    messages = to_conversation(row, data_format, "it", "").messages
    assert [(m.content, m.tool_calls) for m in messages if m.role == "assistant"] == answers
    for message in messages:
        for call in message.tool_calls:
            assert list(call["arguments"]) == list(CALL["arguments"])[: len(call["arguments"])], "in their order"


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize("said_tools", [[FUNCTION], [TOOL], json.dumps([FUNCTION]), json.dumps([TOOL])])
def test_tools_of_a_row(said_tools):
    assert to_conversation({"messages": said("q", "a"), "tools": said_tools}, MESSAGES, "it", "").tools == (TOOL,)
    pair = to_pair({"prompt": "q", "chosen": "a", "rejected": "b", "tools": said_tools}, PREFERENCE, "it", "")
    assert pair.tools == (TOOL,)


@pytest.mark.parametrize("nothing", [None, "", "[]", [], "null", {}])
def test_a_row_without_tools(nothing):
    assert to_conversation({"messages": said("q", "a"), "tools": nothing}, MESSAGES, "it", "").tools == ()


GPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIRS = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["q"]),
    "messages": ({"prompt": said("q"), "chosen": said("x", "a")[1:], "rejected": said("x", "b")[1:]}, ["q"]),
    "one message each": ({"prompt": "q", "chosen": said("x", "a")[1], "rejected": said("x", "b")[1]}, ["q"]),
    "whole dialogues": ({"chosen": said("q", "w", "e", "a"), "rejected": said("q", "w", "e", "b")}, ["q", "w", "e"]),
    "prompt and dialogues": ({"prompt": "q", "chosen": said("q", "a"), "rejected": said("q", "b")}, ["q"]),
    "system": ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, ["s", "q"]),
    "sharegpt": ({"conversations": GPT[:1], "chosen": GPT[1], "rejected": {"from": "gpt", "value": "b"}}, ["q"]),
}


@pytest.mark.parametrize(("row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_pairs(row, prompt):
    pair = to_pair(row, PREFERENCE, "en", "p.jsonl")
    assert [m.content for m in pair.prompt] == prompt
    assert (pair.chosen, pair.rejected) == (Message("assistant", "a"), Message("assistant", "b"))
    assert (pair.language, pair.source) == ("en", "p.jsonl")


NO_PAIRS = {
    "no prompt": ({"chosen": "a", "rejected": "b"}, "no_prompt"),
    "no chosen": ({"prompt": "q", "rejected": "b"}, "missing_field"),
    "rejected null": ({"prompt": "q", "chosen": "a", "rejected": None}, "missing_field"),
    "equal": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen_equals_rejected"),
    "empty chosen": ({"prompt": "q", "chosen": " ", "rejected": "a"}, "empty_answer"),
    "empty rejected": ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty_answer"),
    "different dialogues": ({"chosen": said("q", "a"), "rejected": said("r", "b")}, "no_common_prompt"),
    "another prompt": (
        {"prompt": "x", "chosen": said("q", "a"), "rejected": said("q", "b")},
        "prompt_differs_from_dialogue",
    ),
    "answer by the user": ({"prompt": "q", "chosen": said("a"), "rejected": said("b")}, "answer_not_by_assistant"),
    "prompt ends with an answer": (
        {"prompt": said("q", "w"), "chosen": "a", "rejected": "b"},
        "answer_not_by_assistant",
    ),
    "a number as the prompt": ({"prompt": 7, "chosen": "a", "rejected": "b"}, "content_not_text"),
    "a chosen answer that is not to be learned": (
        {"prompt": "q", "chosen": {"role": "assistant", "content": "a", "weight": 0}, "rejected": "b"},
        "answer_not_supervised",
    ),
    "surrogate": ({"prompt": "q", "chosen": "a\ud800", "rejected": "b"}, "invalid_unicode"),
}


@pytest.mark.parametrize(("row", "reason"), NO_PAIRS.values(), ids=NO_PAIRS)
def test_why_a_pair_cannot_be_used(row, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        to_pair(row, PREFERENCE, "en", "")


@pytest.mark.parametrize(
    ("said", "code"),
    [("it", "it"), ("IT", "it"), ("it-IT", "it"), ("it_IT", "it"), ("ita", "it"), ("Italian", "it"),
     (" italiano ", "it"), ("English", "en"), ("en-US", "en"), ("eng", "en"), ("fr", "fr"), ("", "und"),
     (None, "und"), (3, "und"), ([], "und")],
)  # fmt: skip
def test_language_codes(said, code):
    plain = Source(path="x")
    assert record_language({"language": said}, plain) == code
    assert record_language({"lang": said}, plain) == code
    assert record_language({"l": said, "lang": "xx"}, Source(path="x", language_field="l")) == code
    if isinstance(said, str) and said:
        assert record_language({"lang": "xx"}, Source(path="x", language=said)) == code


@pytest.mark.parametrize("said", ["Python", "it\nmodel: x", "0", "x", "klingon"])
def test_invalid_language_codes_are_undetermined(said):
    assert record_language({"lang": said}, Source(path="x")) == "und"


def test_a_language_with_a_lone_surrogate_is_unusable():
    with pytest.raises(Unusable, match="invalid_unicode"):
        record_language({"lang": "\ud800"}, Source(path="x"))


SCHEMAS = {
    "no object": ([1], "its parameters are not an object"),
    "an array": ({"type": "array"}, "its parameters are of type array"),
    "properties in a list": ({"properties": ["a"]}, "its properties are not schemas"),
    "a property without a schema": ({"properties": {"a": "string"}}, "its properties are not schemas"),
    "required by number": ({"properties": {}, "required": [1]}, "`required` is not a list of names"),
    "required but not there": ({"properties": {"a": {}}, "required": ["b"]}, "requires b, which is not among"),
}


@pytest.mark.parametrize(("parameters", "says"), SCHEMAS.values(), ids=SCHEMAS)
def test_invalid_tool_schemas(parameters, says):
    row = {"messages": said("q", "a"), "tools": [{"name": "f", "parameters": parameters}]}
    with pytest.raises(Unusable, match="tool_schema_wrong") as error:
        to_conversation(row, MESSAGES, "it", "")
    assert says in error.value.detail


@pytest.mark.parametrize("parameters", [{}, {"type": "dict", "properties": {"a": {}}, "required": ["a"]}])
def test_tool_schemas_of_public_data_sets(parameters):
    row = {"messages": said("q", "a"), "tools": [{"name": "f", "parameters": parameters}]}
    assert to_conversation(row, MESSAGES, "it", "").tools[0]["function"]["parameters"] == parameters
