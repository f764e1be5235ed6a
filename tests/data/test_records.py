"""Small records as other tools write them: what is read, what is supervised, and what is reported as unread.

The expected token ids are computed from the texts of the turns, without the package's templates and encoder.
"""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nesso_tune import DataError, NessoError, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.conversation import PreferencePair
from nesso_tune.data.columns import Row, UnreadCounts, Unusable
from nesso_tune.data.record_reader import make_record_reader
from nesso_tune.data.tools import NULL_PROPERTY
from nesso_tune.recipes.sections import ChatSection, ModelSection, Source
from tests.support.examples import examples
from tests.support.runs import BASE, main_here, metrics, recipe, write_recipe

CASES = Path(__file__).parents[3] / "shared" / "cases"
CHAT = chat_tokenizer(ModelSection(base=str(BASE)), ChatSection(template="chatml"))
PLAIN = Tokenizer.from_str(CHAT.backend.to_str())
TOOL = {"name": "meteo", "parameters": {"type": "object", "properties": {"citta": {"type": "string"}}}}
SYSTEM_OF_TOOL = (
    "You can call functions. Their signatures stand between <tools> tags, one JSON object a line:\n<tools>\n"
    '{"type": "function", "function": {"name": "meteo", "parameters": {"type": "object", "properties": {"citta": '
    '{"type": "string"}}}}}\n</tools>\nTo call a function, answer with its name and arguments as JSON between '
    '<tool_call> tags, one block for each call:\n<tool_call>\n{"name": "the function", "arguments": {"an argument": '
    '"its value"}}\n</tool_call>'
)
CALLED = '<tool_call>\n{"name": "meteo", "arguments": {"citta": "Roma"}}\n</tool_call>'
RESULT = "<tool_response>\n20\n</tool_response>"
CALL = {"name": "meteo", "arguments": {"citta": "Roma"}}
QA = [("user", "Chi sei?"), ("assistant", "Sono Nesso.")]
TOOL_TALK = [
    ("system", SYSTEM_OF_TOOL),
    ("user", "Roma?"),
    ("assistant", CALLED),
    ("tool", RESULT),
    ("assistant", "20."),
]


def chat(*turns, **last):
    """Messages of (role, text), with further keys of the last."""
    messages = [{"role": role, "content": text} for role, text in turns]
    return [*messages[:-1], {**messages[-1], **last}]


def said(**last):
    """A row of messages with further keys in the answer."""
    return {"messages": chat(*QA, **last)}


def called(message, **more):
    """A row in which an assistant's message calls a tool."""
    messages = [{"role": "user", "content": "Roma?"}, message, {"role": "tool", "content": "20"}]
    return {"messages": [*messages, {"role": "assistant", "content": "20."}], "tools": [TOOL], **more}


ALPACA = {"instruction": "Chi sei?", "output": "Sono Nesso."}
NUMBERS = [("user", "Quanto fa 1+1?")]
MASKED = [("user", "Chi sei?"), ("assistant-", "Boh."), ("user", "Chi sei?"), ("assistant", "Sono Nesso.")]
PIRATE = [("system", "Fai il pirata."), *QA]
HISTORY = [("user", "Prima?"), ("assistant", "Roma."), *QA]


def masked(**keys):
    return {"messages": [{"role": "user", "content": "Chi sei?"}, {"role": "assistant", "content": "Boh.", **keys},
                         *chat(*QA)]}  # fmt: skip


# name: (row, turns, unread columns and keys: whether they hold text). `assistant-` is not supervised.
READ = {
    "messages": ({"messages": chat(*QA)}, QA, {}),
    "messages with a system message": ({"messages": chat(("system", "Fai il pirata."), *QA)}, PIRATE, {}),
    "messages with ids": ({"messages": chat(*QA), "id": "a-1", "score": 0.5}, QA, {"id": False, "score": False}),
    "messages with a context": (
        {"messages": chat(*QA), "context": "Nesso è qui."}, QA, {"context": True},
    ),
    "a null column": ({"messages": chat(*QA), "note": None}, QA, {"note": False}),
    "a date and an address": (
        {"messages": chat(*QA), "at": "2024-01-01 10:00", "url": "https://a.it/b"}, QA, {"at": False, "url": False},
    ),
    "messages as JSON text": ({"messages": json.dumps(chat(*QA))}, QA, {}),
    "messages in an object": ({"data": {"messages": chat(*QA), "id": 7}}, QA, {"data.id": False}),
    "messages and tools in an object": (
        {"sample": {"messages": called({"role": "assistant", "content": "", "tool_calls": [CALL]})["messages"],
                    "tools": [TOOL]}}, TOOL_TALK, {},
    ),
    "sharegpt in an object": (
        {"chat": {"conversations": [{"from": "human", "value": "Chi sei?"}, {"from": "gpt", "value": "Sono Nesso."}]}},
        QA, {},
    ),
    "messages in an object in another": (
        {"id": 1, "sample": {"data": {"messages": chat(*QA), "note": "due parole"}}}, QA,
        {"id": False, "sample.data.note": True},
    ),
    "Gemini": (
        {"systemInstruction": {"role": "system", "parts": [{"text": "Fai il "}, {"text": "pirata."}]},
         "contents": [{"role": "user", "parts": [{"text": "Chi sei?"}]},
                      {"role": "model", "parts": [{"text": "Sono Nesso."}]}]}, PIRATE, {},
    ),
    "a system prompt of parts": (
        {"system": [{"type": "text", "text": "Fai il pirata.", "cache_control": {"type": "ephemeral"}}],
         "messages": chat(*QA)}, PIRATE, {"system.cache_control": False},
    ),
    "messages as Python writes them": ({"messages": str(chat(*QA))}, QA, {}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Chi sei?"}, {"from": "gpt", "value": "Sono Nesso."}]}, QA, {},
    ),
    "sharegpt with a weight": (
        {"conversations": [{"from": "human", "value": "Chi sei?", "weight": None},
                           {"from": "gpt", "value": "Sono Nesso.", "weight": 1}]}, QA, {},
    ),
    "a system prompt beside messages": ({"system_prompt": "Fai il pirata.", "messages": chat(*QA)}, PIRATE, {}),
    "a system prompt beside another": (
        {"system_prompt": "Fai il re ora.", "messages": chat(("system", "Fai il pirata."), *QA)}, PIRATE,
        {"system_prompt": True},
    ),
    "the same system prompt twice": (
        {"system": "Fai il pirata.", "messages": chat(("system", "Fai il pirata."), *QA)}, PIRATE, {},
    ),
    "a null system prompt": ({"system": None, "messages": chat(*QA)}, QA, {}),
    # supervised or not
    "weight 0": (masked(weight=0), MASKED, {}),
    "weight 0.0": (masked(weight=0.0), MASKED, {}),
    "weight 1": (said(weight=1), QA, {}),
    "weight 1 of a user's turn": (
        {"messages": [{"role": "user", "content": "Chi sei?", "weight": 1}, *chat(*QA)[1:]]}, QA, {},
    ),
    "train": (masked(train=False), MASKED, {}),
    "training": (masked(training=False), MASKED, {}),
    "loss": (masked(loss=False), MASKED, {}),
    "loss_mask 0": (masked(loss_mask=0), MASKED, {}),
    "loss_mask false": (masked(loss_mask=False), MASKED, {}),
    "masked": (masked(masked=True), MASKED, {}),
    "masked false": (said(masked=False), QA, {}),
    "two keys that agree": (masked(masked=True, weight=0), MASKED, {}),
    "a null flag": (said(train=None, weight=None), QA, {}),
    "a user's turn that is trained": (
        {"messages": [{"role": "user", "content": "Chi sei?", "training": True}, *chat(*QA)[1:]]},
        [("user+", "Chi sei?"), QA[1]], {},
    ),
    # reasoning and other keys of messages
    "reasoning_content": (said(reasoning_content="Penso."), QA, {}),
    "thinking": (said(thinking="Penso a lungo."), QA, {}),
    "a null thinking": (said(thinking=None), QA, {}),
    "a name and an id": (
        said(name="Ada", id="m1"), QA, {"messages.name": False, "messages.id": False},
    ),
    "a part with annotations": (
        {"messages": [chat(*QA)[0], {"role": "assistant", "content": [
            {"type": "text", "text": "Sono Nesso.", "annotations": ["vedi la nota"]}]}]},
        QA, {"messages.content.annotations": True},
    ),
    # tools
    "tool calls": (called({"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function",
                  "function": CALL}]}), TOOL_TALK, {}),
    "a call with a note": (
        called({"role": "assistant", "content": "", "tool_calls": [{**CALL, "why": "serve il meteo"}]}), TOOL_TALK,
        {"messages.tool_calls.why": True},
    ),
    "arguments as JSON text": (
        called({"role": "assistant", "content": None, "tool_calls": [{"function": {
            "name": "meteo", "arguments": '{"citta": "Roma"}'}}]}), TOOL_TALK, {},
    ),
    "a legacy function call": (
        {"messages": [{"role": "user", "content": "Roma?"},
                      {"role": "assistant", "content": None, "function_call": {"name": "meteo", "arguments":
                       '{"citta": "Roma"}'}},
                      {"role": "function", "name": "meteo", "content": "20"}, {"role": "assistant", "content": "20."}],
         "functions": [TOOL]}, TOOL_TALK, {},
    ),
    "a legacy function call after a text": (
        called({"role": "assistant", "content": "Vedo.", "function_call": CALL}),
        [*TOOL_TALK[:2], ("assistant", f"Vedo.\n{CALLED}"), *TOOL_TALK[3:]], {},
    ),
    "both kinds of calls": (
        called({"role": "assistant", "content": "", "tool_calls": [CALL], "function_call": {"name": "altra"}}),
        TOOL_TALK, {"messages.function_call": False},
    ),
    "roles of ms-swift": (
        {"messages": [{"role": "user", "content": "Roma?"}, {"role": "tool_call", "content": json.dumps(CALL)},
                      {"role": "tool_response", "content": "20"}, {"role": "assistant", "content": "20."}],
         "tools": json.dumps([TOOL])}, TOOL_TALK, {},
    ),
    "nulls in tools and arguments": (
        called({"role": "assistant", "content": "", "tool_calls": [{"function": {
            "name": "meteo", "arguments": {"citta": "Roma", "fuso": None, "zona": float("nan")}}}]},
            tools=[{"type": "function", "function": {"name": "meteo", "description": None, "parameters": {
                "type": "object", "properties": {"citta": {"type": "string", "enum": None}, "fuso": None}}}}]),
        TOOL_TALK, {},
    ),
    "results that are no texts": (
        {"messages": [{"role": "user", "content": "Roma?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                      {"role": "tool", "content": 20}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                      {"role": "tool", "content": [{"città": "Roma", "gradi": 20}]},
                      {"role": "assistant", "content": "20."}], "tools": str([TOOL])},
        [*TOOL_TALK[:4], ("assistant", CALLED),
         ("tool", '<tool_response>\n[{"città": "Roma", "gradi": 20}]\n</tool_response>'), TOOL_TALK[4]], {},
    ),
    "tools as a list of JSON texts": ({**ALPACA, "tools": [json.dumps(TOOL)]}, [("system", SYSTEM_OF_TOOL), *QA], {}),
    "a tool with a key beside it": (
        called({"role": "assistant", "content": "", "tool_calls": [CALL]},
               tools=[{"type": "function", "function": TOOL, "strict": True}]), TOOL_TALK, {"tools.strict": False},
    ),
    # instruction and response
    "alpaca": ({**ALPACA, "input": ""}, QA, {}),
    "alpaca with an input": (
        {**ALPACA, "input": "In breve."}, [("user", "Chi sei?\n\nIn breve."), QA[1]], {},
    ),
    "alpaca with an input that is a number": (
        {**ALPACA, "input": 7}, [("user", "Chi sei?\n\n7"), QA[1]], {},
    ),
    "alpaca with an input that is NaN": ({**ALPACA, "input": float("nan")}, QA, {}),
    "alpaca with a text column": (
        {**ALPACA, "text": "### Instruction: Chi sei?"}, QA, {"text": True},
    ),
    "alpaca with tools": (
        {**ALPACA, "tools": [TOOL]}, [("system", SYSTEM_OF_TOOL), *QA], {},
    ),
    "a second prompt": ({**ALPACA, "question": "E tu, di nuovo?"}, QA, {"question": True}),
    "dolly": (
        {"instruction": "Chi sei?", "context": "Nesso è qui.", "response": "Sono Nesso.", "category": "closed_qa"},
        [("user", "Chi sei?\n\nNesso è qui."), QA[1]], {"category": False},
    ),
    "an empty input beside a context": (
        {**ALPACA, "input": "", "context": "Nesso è qui."}, [("user", "Chi sei?\n\nNesso è qui."), QA[1]], {},
    ),
    "an input beside a context": (
        {**ALPACA, "input": "In breve.", "context": "Nesso è qui."}, [("user", "Chi sei?\n\nIn breve."), QA[1]],
        {"context": True},
    ),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Fai il pirata.", "question": "Chi sei?", "response": "Sono Nesso."}, PIRATE,
        {"id": False},
    ),
    "history": ({**ALPACA, "input": "", "history": [["Prima?", "Roma."]]}, HISTORY, {}),
    "an empty history": ({**ALPACA, "history": []}, QA, {}),
    "a system prompt and a history": (
        {**ALPACA, "system": "Fai il pirata.", "history": [["Prima?", "Roma."]]}, [PIRATE[0], *HISTORY], {},
    ),
    "a number": ({"instruction": "Quanto fa 1+1?", "output": 2}, [*NUMBERS, ("assistant", "2")], {}),
    "a fraction": ({"instruction": "Quanto fa 1+1?", "output": 2.5}, [*NUMBERS, ("assistant", "2.5")], {}),
    "true": ({"instruction": "Quanto fa 1+1?", "output": True}, [*NUMBERS, ("assistant", "true")], {}),
    "a number in messages": (
        {"messages": [{"role": "user", "content": "Quanto fa 1+1?"}, {"role": "assistant", "content": 2}]},
        [*NUMBERS, ("assistant", "2")], {},
    ),
    "TRL texts": ({"prompt": "Chi sei?", "completion": "Sono Nesso."}, QA, {}),
    "TRL messages": ({"prompt": chat(QA[0]), "completion": chat(QA[1])}, QA, {}),
    "TRL messages with an earlier answer": (
        {"prompt": chat(("user", "Ciao."), ("assistant", "Salve."), QA[0]), "completion": chat(QA[1])},
        [("user", "Ciao."), ("assistant-", "Salve."), *QA], {},
    ),
    "Capybara": (
        {"source": "Airoboros", "conversation": [{"input": "Chi sei?", "output": "Sono Nesso."}]}, QA,
        {"source": False},
    ),
    "two exchanges": (
        {"conversation": [{"human": "Prima?", "assistant": "Roma.", "topic": "le città d'Italia"},
                          {"human": "Chi sei?", "assistant": "Sono Nesso."}]}, HISTORY, {"conversation.topic": True},
    ),
}  # fmt: skip

ASKED, PAIR = "Chi sei?", ("Sono Nesso.", "Boh.")
ANSWERS = {"chosen": "Sono Nesso.", "rejected": "Boh."}
# name: (row, turns of the prompt, (chosen, rejected), unread)
PAIRS = {
    "texts": ({"prompt": ASKED, **ANSWERS}, QA[:1], PAIR, {}),
    "a system prompt": ({"system_prompt": "Fai il pirata.", "prompt": ASKED, **ANSWERS}, PIRATE[:2], PAIR, {}),
    "an input beside the instruction": (
        {"instruction": ASKED, "input": "In breve.", **ANSWERS}, [("user", "Chi sei?\n\nIn breve.")], PAIR, {},
    ),
    "a history": ({"instruction": ASKED, "history": [["Prima?", "Roma."]], **ANSWERS}, HISTORY[:3], PAIR, {}),
    "numbers": ({"prompt": ASKED, "chosen": 2, "rejected": 3}, QA[:1], ("2", "3"), {}),
    "ms-swift": ({"messages": chat(*QA), "rejected_response": "Boh."}, QA[:1], PAIR, {}),
    "ms-swift, older": (
        {"query": ASKED, "response": "Sono Nesso.", "rejected_response": "Boh.", "system": "Fai il pirata."},
        PIRATE[:2], PAIR, {},
    ),
    "ms-swift messages": (
        {"messages": chat(*QA), "rejected_messages": chat(QA[0], ("assistant", "Boh."))}, QA[:1], PAIR, {},
    ),
    "OpenAI": (
        {"input": {"messages": chat(QA[0]), "parallel_tool_calls": True}, "preferred_output": chat(QA[1]),
         "non_preferred_output": chat(("assistant", "Boh."))}, QA[:1], PAIR, {"input.parallel_tool_calls": False},
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: Prima?\n\nAssistant: Roma.\n\nHuman: Chi sei?\n\nAssistant: Sono Nesso.",
         "rejected": "\n\nHuman: Prima?\n\nAssistant: Roma.\n\nHuman: Chi sei?\n\nAssistant: Boh."},
        HISTORY[:3], PAIR, {},
    ),
    "hh-rlhf with a prompt": (
        {"prompt": "\n\nHuman: Chi sei?\n\nAssistant:", "chosen": " Sono Nesso.", "rejected": " Boh."}, QA[:1],
        PAIR, {},
    ),
    "UltraFeedback, binarized": (
        {"prompt": ASKED, "prompt_id": "af3e", "chosen": chat(*QA), "rejected": chat(QA[0], ("assistant", "Boh.")),
         "messages": chat(*QA), "score_chosen": 8.0}, QA[:1], PAIR,
        {"prompt_id": False, "messages": False, "score_chosen": False},
    ),
    "UltraFeedback": (
        {"source": "evol_instruct", "instruction": ASKED, "completions": [
            {"response": "Boh.", "overall_score": 2.0, "model": "a", "critique": "Non dice niente."},
            {"response": "Sono Nesso.", "overall_score": 9.0, "model": "b", "critique": "Dice il nome."},
            {"response": "Un modello.", "overall_score": 6.0, "model": "c", "critique": "Quasi giusto."}]},
        QA[:1], PAIR, {"source": False, "completions.model": False, "completions.critique": True},
    ),
    "reasoning of an answer": (
        {"prompt": ASKED, "chosen": chat(QA[1], reasoning="Penso a lungo."), "rejected": "Boh."}, QA[:1], PAIR,
        {},
    ),
}  # fmt: skip


def ids(text):
    return PLAIN.encode(text, add_special_tokens=False).ids


def expected(turns):
    """Token ids of turns in ChatML, and labels: an answer with its end token is supervised, or what the mark says."""
    start, end = PLAIN.token_to_id("<|im_start|>"), PLAIN.token_to_id("<|im_end|>")
    tokens, labels = [], []
    for role, text in turns:
        name, body = role.rstrip("+-"), [*ids(text), end]
        learned = role in ("assistant", "user+")
        parts = [(False, [start, *ids(f"{name}\n")]), (learned, body), (False, ids("\n"))]
        tokens += [token for _, part in parts for token in part]
        labels += [token if yes else -100 for yes, part in parts for token in part]
    return tokens, labels


def without_reasoning(example):
    """The example as `data.reasoning: drop` leaves it."""

    def plain(turn):
        return replace(turn, reasoning=None)

    if isinstance(example, PreferencePair):
        return replace(example, chosen=plain(example.chosen), rejected=plain(example.rejected))
    return replace(example, messages=tuple(map(plain, example.messages))) if hasattr(example, "messages") else example


def read(row, method, folder, **keys):
    """The example of a row whose format is detected, and the row with what is noted."""
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    noted = Row(json.loads(file.read_text()))
    example = make_record_reader(Source(path=str(file), **keys), method).read(noted, "rows.jsonl:1")
    return without_reasoning(example), noted


@pytest.mark.parametrize(("row", "turns", "unread"), READ.values(), ids=READ)
def test_what_is_read_of_a_record(row, turns, unread, tmp_path):
    example, noted = read(row, "sft", tmp_path)
    (encoded,) = CHAT.encoder.conversations([example], ("assistant",), "turn")
    assert (encoded.ids, encoded.labels) == expected(turns)
    assert noted.unread() == unread


@pytest.mark.parametrize(("row", "prompt", "answers", "unread"), PAIRS.values(), ids=PAIRS)
def test_what_is_read_of_a_pair(row, prompt, answers, unread, tmp_path):
    example, noted = read(row, "dpo", tmp_path)
    (encoded,) = CHAT.encoder.pairs([example])
    opening = [PLAIN.token_to_id("<|im_start|>"), *ids("assistant\n")]
    end = PLAIN.token_to_id("<|im_end|>")
    assert encoded.prompt == [*expected(prompt)[0], *opening]
    assert (encoded.chosen, encoded.rejected) == tuple([*ids(text), end] for text in answers)
    assert noted.unread() == unread


def test_a_prompt_and_an_answer_in_objects(tmp_path):
    row = {"inputs": {"messages": chat(QA[0])}, "outputs": {"message": chat(QA[1])[0]}}
    keys = {"format": "prompt_completion", "prompt_field": "inputs.messages", "response_field": "outputs.message"}
    example, noted = read(row, "sft", tmp_path, **keys)
    assert ([(turn.role, turn.content) for turn in example.messages], noted.unread()) == (QA, {})


def test_roles_that_are_numbers(tmp_path):
    for roles in ((0, 1), (0.0, 1.0), (False, True)):
        row = {"messages": [{"role": role, "content": text} for role, (_, text) in zip(roles, QA, strict=True)]}
        names = ("false", "true") if roles[0] is False else ("0", "1")
        example, _ = read(row, "sft", tmp_path, roles=dict(zip(names, ("user", "assistant"), strict=True)))
        assert [(turn.role, turn.content) for turn in example.messages] == QA


def test_the_table_is_large():
    assert len(READ) + len(PAIRS) >= 60


DROPPED = {
    "a weight between": (said(weight=0.5), "weight_not_0_or_1"),
    "a weight as text": (said(weight="1"), "weight_not_0_or_1"),
    "a flag as text": (said(loss="false"), "loss_not_true_or_false"),
    "keys that contradict each other": (masked(train=True, weight=0), "supervision_contradictory"),
    "a history of texts": ({**ALPACA, "history": ["a", "b"]}, "history_not_readable"),
    "a history of one column": ({**ALPACA, "history": [["a"]]}, "history_not_readable"),
}


@pytest.mark.parametrize(("row", "reason"), DROPPED.values(), ids=DROPPED)
def test_records_that_are_dropped(row, reason, tmp_path):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        read(row, "sft", tmp_path)


def test_equal_scores_have_no_better_answer(tmp_path):
    row = {"instruction": "q", "completions": [{"response": text, "overall_score": 5} for text in "ab"]}
    with pytest.raises(Unusable, match="no_preferred_answer"):
        read(row, "dpo", tmp_path)


def paths_of(value, prefix=""):
    """The path of every key in objects, without the indices of lists, and the objects and keys at it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{prefix}{key}", value, key
            yield from paths_of(item, f"{prefix}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from paths_of(item, prefix)


ALL_ROWS = [("sft", row) for row, *_ in READ.values()] + [("dpo", row) for row, *_ in PAIRS.values()]


def tokens_of(example):
    encoder = CHAT.encoder
    if hasattr(example, "chosen"):
        (pair,) = encoder.pairs([example])
        return pair.prompt, pair.chosen, pair.rejected
    (encoded,) = encoder.conversations([example], ("assistant",), "turn")
    return encoded.ids, encoded.labels


@pytest.mark.parametrize(("method", "row"), ALL_ROWS, ids=[*READ, *PAIRS])
def test_what_is_unread_changes_nothing(method, row, tmp_path):
    """Without the unread keys, a record has the same tokens."""
    example, noted = read(row, method, tmp_path)
    less = copy.deepcopy(row)
    for path, entry, key in list(paths_of(less)):
        if path in noted.unread():
            entry.pop(key, None)
    again, rest = read(less, method, tmp_path)
    assert rest.unread() == {}
    assert tokens_of(again) == tokens_of(example)


KEYS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12).map(lambda name: f"zz_{name}")
TEXTS = st.lists(st.text("abcdeàèìòù", min_size=1, max_size=8), min_size=2, max_size=6).map(" ".join)


@given(st.sampled_from(ALL_ROWS), KEYS, TEXTS, st.data())
@examples(150)
def test_an_added_column_or_message_key_is_always_unread(tmp_path_factory, row, key, text, data):
    """And no key that was read before is."""
    (method, record), folder = row, tmp_path_factory.mktemp("added")
    before, noted = read(record, method, folder)
    changed = copy.deepcopy(record)
    objects = [("", changed)]
    for path, entry, name in paths_of(changed):
        lists = [item for item in entry[name] if isinstance(item, dict)] if isinstance(entry[name], list) else []
        objects += [(f"{path}.", item) for item in lists if "role" in item or "from" in item]
    path, entry = data.draw(st.sampled_from(objects))
    entry[key] = text
    after, again = read(changed, method, folder)
    assert again.unread() == {**noted.unread(), f"{path}{key}": True}
    assert tokens_of(after) == tokens_of(before)


def test_long_labels_take_linear_time():
    row = Row({"messages": [], "blob": "x" * 5_000_000})
    row.read.add("messages")
    assert row.unread() == {"blob": False}


NAMED = {
    "no such column": ({"system_field": "sistema"}, r"no column `sistema` \(system_field\); its columns are"),
    "a typo": ({"tools_field": "tool"}, r"no column `tool` \(tools_field\); did you mean `tools`\?"),
    "a score": ({"score_field": "voto", "min_score": 1}, r"no column `voto` \(score_field\)"),
    "not of this format": ({"response_field": "tools"}, "`response_field` has no effect: the detected format is mess"),
    "not of this format, choices": ({"label_fields": ["tools"]}, "`label_fields` has no effect"),
}


@pytest.mark.parametrize(("keys", "says"), NAMED.values(), ids=NAMED)
def test_a_named_column_that_is_not_read_is_an_error(keys, says, sft, write_rows):
    rows = [{"messages": chat(*QA), "tools": []}] * 3
    with pytest.raises(DataError, match=says):
        prepare_data(sft({"path": write_rows(rows), **keys}))


def test_a_named_column_may_come_late(sft, write_rows):
    rows = [{"messages": chat(*QA)}] * 80 + [{"messages": chat(*QA), "persona": "Fai il pirata."}]
    data = prepare_data(sft({"path": write_rows(rows), "system_field": "persona"}, packing=False))
    assert sum(expected(PIRATE)[0] == row["input_ids"] for row in data.train) == 1


def test_a_readers_row_is_read_whole_but_not_what_it_returns(sft, write_rows, tmp_path):
    (tmp_path / "own.py").write_text(
        "def f(row):\n    return {'prompt': row['q'], 'response': row['a'], 'sistem': row['s']}\n"
    )
    path = write_rows([{"q": "Chi sei?", "a": "Nesso.", "s": "Fai il pirata.", "z": "due parole"}])
    report = prepare_data(sft({"path": path, "format": f"{tmp_path / 'own.py'}:f"})).report
    assert report["unread"] == report["unread_texts"] == {path: {"sistem": 1}}
    (tmp_path / "whole.py").write_text(
        "from nesso_tune import Conversation, Message\n"
        "def f(row):\n"
        "    return Conversation((Message('user', row['q']), Message('assistant', row['a'])))\n"
    )
    report = prepare_data(sft({"path": path, "format": f"{tmp_path / 'whole.py'}:f"})).report
    assert report["unread"] == report["unread_texts"] == {}


def test_every_command_names_what_is_unread(tmp_path, write_rows, capsys):
    rows = [{**ALPACA, "instruction": f"Chi sei, {i}?", "note": "due parole", "id": i} for i in range(12)]
    private = [{**ALPACA, "instruction": f"E tu, {i}?", "CANARY": "due parole"} for i in range(12)]
    public, hidden = write_rows(rows), write_rows(private, "private.jsonl")
    held = [{**row, "held": "altre parole"} for row in rows]
    sources = {"sources": [{"path": public}, {"path": hidden, "private": True}],
               "validation_sources": [{"path": write_rows(held, "held.jsonl")}]}  # fmt: skip
    some = recipe(
        "sft",
        tmp_path / "run",
        [public],
        data={**sources, "packing": False, "validation_size": 0.01},
        train={"max_steps": 1},
    )
    path = write_recipe(tmp_path / "r.yaml", some)
    unread = {public: {"note": 12, "id": 12}, "private source 2": {"key 1": 12},
              str(tmp_path / "held.jsonl"): {"note": 12, "id": 12, "held": 12}}  # fmt: skip
    code, out, _ = main_here(capsys, "check", path, "--json")
    assert (code, json.loads(out)["volume"]["unread"]) == (0, unread)
    code, out, _ = main_here(capsys, "check", path)
    assert "warning" in out
    assert "private source 2: text that is not read: key 1 (12 rows)" in " ".join(out.split())
    code, out, _ = main_here(capsys, "prepare", path, "--json")
    assert (code, json.loads(out)["unread"]) == (0, unread)
    code, out, _ = main_here(capsys, "prepare", path)
    assert "note (12 rows), id (12 rows)" in out
    assert "CANARY (12 rows)" in out, "the terminal names them"
    assert any(f"{public}: text that is not read: note (12 rows);" in line for line in out.splitlines())
    code, out, _ = main_here(capsys, "preview", path)
    assert "not read" in out
    code, _, err = main_here(capsys, "train", path)
    assert code == 0, err
    assert "text that is not read: note (12 rows)" in err
    assert "text that is not read: key 1 (12 rows)" in err
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["unread"] == unread
    assert report["sources"][0]["unread_texts"] == {"note": 12}
    page = (tmp_path / "run" / "data_report.html").read_text()
    assert re.search(r"<h2>Columns and message keys that are not read</h2>.*>note<.*>key 1<", page, re.DOTALL)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and b"CANARY" in file.read_bytes()]
    assert metrics(tmp_path / "run")
    code, out, _ = main_here(capsys, "init", str(tmp_path / "new"), "--base", str(BASE), "--data", public)
    assert code == 0
    assert "not read: note (12 rows), id (12 rows)" in out
    assert "text that is not read: note (12 rows)" in out


def test_counts_and_anomalies_add_up_over_blocks(sft, write_rows):
    """More than one block, in worker processes."""
    rows = [{"instruction": f"Quanto fa {i}+1? {'x' * 600}", "output": i + 1, "id": i} for i in range(2000)]
    rows += [{"instruction": "a", "output": "b", "id": 7, "note": "due parole"}] * 5
    path = write_rows(rows)
    report = prepare_data(sft(path, sequence_len=4096)).report
    assert report["unread"] == {path: {"id": 2005, "note": 5}}
    assert report["unread_texts"] == {path: {"note": 5}}
    assert report["oddities"]["number_as_text"] == {"rows": 2000, "example": f"{path}:1"}


def test_unread_counts_merge():
    first, second = UnreadCounts(), UnreadCounts()
    for counts in (first, second):
        counts.add(Row({"a": 1, "b": "due parole"}))
    first.merge(second)
    assert (first.rows, first.texts) == ({"a": 2, "b": 2}, {"b": 2})


# file: method, rows kept or the beginning of the error, unread, anomalies
SHARED_CASES = {
    "dolly.jsonl": ("sft", 6, {"category": 6}, {}),
    "openorca.jsonl": ("sft", 6, {"id": 6}, {}),
    "lf_alpaca_history.jsonl": ("sft", 6, {}, {}),
    "numbers.jsonl": ("sft", 6, {}, {"number_as_text": 6}),
    "weight0.jsonl": ("sft", 6, {}, {}),
    "training_false.jsonl": ("sft", 6, {}, {}),
    "loss_false.jsonl": ("sft", 6, {}, {}),
    "train_false.jsonl": ("sft", 6, {}, {}),
    "function_call_text.jsonl": ("sft", 6, {}, {}),
    "function_call_null.jsonl": ("sft", 6, {}, {}),
    "tools_nulls.jsonl": ("sft", 6, {}, {NULL_PROPERTY: 6, "call_of_a_tool_not_offered": 3}),
    "tools_nulls.parquet": ("sft", 6, {}, {"call_of_a_tool_not_offered": 3}),
    "tools_clean.jsonl": ("sft", 6, {}, {"call_of_a_tool_not_offered": 3}),
    "trl_prompt_completion.jsonl": ("sft", 6, {}, {}),
    "all_masked.jsonl": ("sft", "nothing_to_learn", {}, {}),
    "pref_sysprompt.jsonl": ("dpo", 6, {}, {}),
    "lf_alpaca_pref.jsonl": ("dpo", 6, {}, {}),
    "hh.jsonl": ("dpo", 6, {}, {}),
    "swift_dpo.jsonl": ("dpo", 6, {}, {}),
    "pairs3.jsonl": ("dpo", 3, {}, {}),
}


@pytest.mark.parametrize("name", SHARED_CASES)
def test_shared_cases(name, sft, dpo):
    path = CASES / name
    if not path.is_file():
        pytest.skip("no shared cases here")
    method, kept, unread, anomalies = SHARED_CASES[name]
    some = (sft if method == "sft" else dpo)(str(path), sequence_len=1024)
    if isinstance(kept, str):
        with pytest.raises(NessoError, match=kept):
            prepare_data(some)
        return
    report = prepare_data(some).report
    assert report["rows_kept"] == kept
    assert report["unread"] == ({str(path): unread} if unread else {})
    assert {mark: of["rows"] for mark, of in report["oddities"].items()} == anomalies


def test_tables_and_lines_with_nulls_have_the_same_tokens(sft):
    """Nulls as `datasets.to_json` writes them, and the Parquet file of the same rows."""
    if not CASES.is_dir():
        pytest.skip("no shared cases here")
    as_lines, as_table = (
        prepare_data(sft(str(CASES / name), packing=False, sequence_len=1024))
        for name in ("tools_nulls.jsonl", "tools_nulls.parquet")
    )
    assert [row["input_ids"] for row in as_lines.train] == [row["input_ids"] for row in as_table.train]
