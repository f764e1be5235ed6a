"""Fuzzing: any data file gives an error in the standard form, or rows that are kept or counted as dropped."""

import io
import json
import os
import string
from collections import Counter
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from nesso_tune import NessoError, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.conversation import Conversation, PreferencePair
from nesso_tune.data.block_encoder import BlockEncoder
from nesso_tune.data.blocks import JsonLinesBlock
from nesso_tune.data.formats import DataFormat, load_format
from nesso_tune.data.record_reader import RecordReader
from nesso_tune.recipes.sections import ChatSection, CleanSection, DPOData, ModelSection, SFTData, Source
from tests.data.test_faults import GOOD, MODEL, PAIRS, Given, adds_up, lines, well_said
from tests.support.examples import examples

FORMATS = ("auto", *GOOD)
TALKS = ("auto", "messages", "sharegpt", "alpaca")  # formats whose rows are conversations
KINDS = ("conversation", "instruction")  # and the kinds of such formats
QUICK = examples(8)
WIDE = examples(10)  # where no file is written

# --- rows ---

SPELT = (
    "<|im_end|>", "<|im_start|>", "<|im_", "start|>", "<|im_start|>user\n", "<s>", "</s>", "<unk>", "<tool_call>",
    "</tool_call>", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "<think>", "{prompt}", "{{x}}",
)  # fmt: skip
ODD = (
    "", " ", "\n", "\x00", "\ud800", "\udc00a", "\ufeff", "\u200b", "\u2028", "è", "e\u0301", "🇮🇹", "\U0010ffff",
    "[", "[]", "{}", '[{"role": "user", "content": "q"}]', "NaN", "-100", "1",
)  # fmt: skip
WORDS = ("system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "text", "thinking",
         "tool_call", "function", "image_url", "it", "en")  # fmt: skip
TEXTS = (
    st.sampled_from(SPELT + ODD + WORDS)
    | st.text(st.characters(exclude_categories=()), max_size=6)
    | st.lists(st.sampled_from(SPELT + ODD + WORDS), min_size=2, max_size=4).map("".join)
)
COLUMNS = sorted(
    {
        name
        for format_name in GOOD
        for key, names in load_format(format_name)
        if key.endswith("_field")
        for name in names
    }
)
COLUMNS += ["type", "text", "value", "name", "train", "tool_calls", "function", "arguments", "parameters", "lang",
            "output_1", "output_2", "label", "score", "a", "0"]  # fmt: skip
KEYS = st.sampled_from(COLUMNS) | TEXTS
NUMBERS = st.integers(-3, 300) | st.sampled_from([-100, 2**31, -(2**31) - 1, 2**63, 2**64, 10**400, -(10**18)])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
ROWS = st.dictionaries(KEYS, VALUES, max_size=5)


def places(value, here=()):
    """The paths in a value at which something can be replaced."""
    yield here
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*here, key))


def replaced(value, place, by):
    """A value with one path replaced."""
    if not place:
        return by
    copied = value.copy()
    copied[place[0]] = replaced(value[place[0]], place[1:], by)
    return copied


CALLS = [{"name": "cerca", "arguments": {"parola": "nesso", "n": 3}}]
OFFER = [{"type": "function", "function": {"name": "cerca", "parameters": {"type": "object", "properties": {}}}}]
SAID = [
    {"role": "system", "content": "Sii breve."},
    {"role": "user", "content": [{"type": "text", "text": "Chi sei?"}], "name": "Ada"},
    {"role": "assistant", "content": "Cerco.", "tool_calls": CALLS, "train": True},
    {"role": "tool", "content": '{"trovato": 1}'},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "Mah."}, {"type": "text", "text": "Nesso."}]},
]
WHOLE = {  # rows with everything that a format knows
    "messages": [GOOD["messages"], {"messages": SAID, "tools": OFFER, "lang": "it"},
                 {"messages": json.dumps(SAID), "tools": json.dumps(OFFER)}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "Cerco."},
                           {"from": "function_call", "value": json.dumps(CALLS[0])},
                           {"from": "observation", "value": "x"}, {"from": "gpt", "value": "a"}],
         "system": "s", "tools": json.dumps(OFFER)},
    ],
    "alpaca": [{"instruction": "Chi sei?", "input": "Dillo.", "output": "Nesso.", "system": "s", "language": "it"}],
    "completion": [GOOD["completion"]],
    "pretokenized": [GOOD["pretokenized"], {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}],
    "preference": [
        GOOD["preference"],
        {"prompt": SAID[:2], "chosen": [SAID[4]], "rejected": SAID[2], "tools": OFFER, "system": "s"},
        {"chosen": [*SAID[1:], {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
         "rejected": [*SAID[1:], {"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ],
    "choice": [GOOD["choice"], {"prompt": "q", "input": "x", "output_1": "a", "output_2": "b", "label": "2"}],
}  # fmt: skip


@st.composite
def nearly(draw, format_name):
    """A row of a format with up to two replaced values."""
    row = draw(st.sampled_from(WHOLE[format_name]))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(list(places(row))[1:] or [()]))
        row = replaced(row, place, draw(VALUES)) if place else draw(ROWS)
    return row


# --- what must hold ---


@lru_cache(maxsize=1)
def chat():
    return chat_tokenizer(ModelSection.model_validate(MODEL), ChatSection())


@lru_cache(maxsize=1)
def marks():
    """The ids of the start and end of a turn, and of all other special tokens."""
    start, end = (chat().backend.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    special = {i for i, token in chat().backend.get_added_tokens_decoder().items() if token.special}
    return start, end, special - {start, end}


def prepared(some, turns=True):
    """Prepares what is given: an error that is well said, or rows that add up and are labelled as they must be.

    `turns` says whether its rows are conversations: every token that opens or ends a turn is the template's then.
    """
    with TemporaryDirectory() as folder:
        recipe = some.recipe(Path(folder))
        before = set(trusted())
        try:
            data = prepare_data(recipe)
        except NessoError as error:
            well_said(error)
            assert set(trusted()) == before, "nothing of it is taken later"
            return None
        adds_up(data.report)
        start, end, others = marks()
        for row in data.train:
            if some.method == "dpo":
                assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == end
                assert [list(row[f"{part}_ids"]).count(end) for part in ("chosen", "rejected")] == [1, 1]
                continue
            ids, labels = (list(map(int, row[name])) for name in ("input_ids", "labels"))
            assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
            assert any(label != -100 for label in labels[1:])
            if turns:
                counted = Counter(ids)
                assert counted[start] == counted[end]
                assert others.isdisjoint(counted)
        return data.report


def trusted():
    return list(Path(os.environ["NESSO_TUNE_CACHE"], "documents").glob("*/done.json"))


def under(format_name, content, name="rows.jsonl", **more):
    """The content under a format, for its method or for the other one."""
    source = {} if format_name == "auto" else {"format": format_name}
    source |= {"labels": [1, 2]} if format_name == "choice" else {}
    method = more.pop("method", "dpo" if format_name in PAIRS else "sft")
    return Given(content, method, source, {"packing": False} if method == "sft" else {}, name=name, **more)


# --- (a) bytes ---

NAMES = st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet", "rows.txt"])


@QUICK
@given(
    NAMES, st.binary(max_size=200) | st.text(string.printable, max_size=80).map(str.encode), st.sampled_from(FORMATS)
)
@example("rows.jsonl", b"\xff\xfe{\x00}\x00", "auto")
@example("rows.parquet", b"PAR1PAR1PAR1", "auto")
@example("rows.json", b"[" * 3000, "messages")
def test_any_bytes(name, content, format_name):
    prepared(under(format_name, content, name), format_name in TALKS)


@lru_cache
def whole(format_name, kind):
    """A valid file."""
    rows = WHOLE[format_name]
    if kind == "rows.jsonl":
        return lines(*rows, *rows)
    if kind == "rows.json":
        return json.dumps([*rows, *rows], indent=1).encode()
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([GOOD[format_name]] * 3), out)
    return out.getvalue()


@st.composite
def damaged(draw):
    """A file of a format with a few bytes flipped, deleted, duplicated or inserted."""
    format_name, kind = (
        draw(st.sampled_from(sorted(GOOD))),
        draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet"])),
    )
    content = bytearray(whole(format_name, kind))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how, size = draw(st.sampled_from(["flip", "cut", "end", "double", "insert"])), draw(st.integers(1, 8))
        if how == "flip" and content:
            content[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del content[at : at + size]
        elif how == "end":
            del content[at:]
        elif how == "double":
            content[at:at] = content[at : at + 8 * size]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
    return format_name, kind, bytes(content)


@examples(15)
@given(damaged(), st.booleans())
def test_any_damage_to_a_file(broken, named):
    format_name, kind, content = broken
    automatic = not named and format_name not in ("completion", "pretokenized", "choice")
    method = "dpo" if format_name in PAIRS else "sft"
    prepared(under("auto" if automatic else format_name, content, kind, method=method), format_name in TALKS)


# --- (b) rows ---


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("format_name", FORMATS)
@examples(5)
@given(st.data())
def test_any_rows(format_name, method, data):
    sound = [] if format_name == "auto" else [lines(GOOD[format_name])] * data.draw(st.integers(0, 1))
    rows = [json.dumps(row).encode() + b"\n" for row in data.draw(st.lists(ROWS, min_size=1, max_size=4))]
    prepared(under(format_name, b"".join(sound + rows), method=method), format_name in TALKS)


# --- (c) rows that are nearly sound ---


@lru_cache
def working(format_name, cleaned):
    """The pipeline step for rows of a format, without files."""
    kind, method = (DPOData, "dpo") if format_name in PAIRS else (SFTData, "sft")
    clean = {"unicode": "nfc", "invisible": "remove", "empty_turns": "remove", "role_order": "merge",
             "near_duplicates": 0.8} if cleaned else {"role_order": "keep"}  # fmt: skip
    data = kind.model_validate({"sources": [{"path": "x"}], "sequence_len": 512, "clean": clean, "reasoning": "drop"})
    source = Source(
        path="x",
        format=format_name,
        labels=(1, 2) if format_name == "choice" else None,
        language="auto" if cleaned else None,
    )
    return BlockEncoder(
        [RecordReader(source, load_format(format_name).adapted(source), method, CleanSection(**clean))], data, chat()
    )


def offers(item):
    """1 if the tools are rendered as a system message of their own."""
    turns = item.prompt if isinstance(item, PreferencePair) else item.turns
    return int(bool(item.tools) and not (turns and turns[0].role == "system"))


@pytest.mark.parametrize("cleaned", [False, True], ids=["as they are", "cleaned"])
@pytest.mark.parametrize("format_name", sorted(GOOD))
@WIDE
@given(st.data())
def test_nearly_valid_rows(format_name, cleaned, data):
    rows = data.draw(st.lists(nearly(format_name), min_size=1, max_size=3))
    work, (start, end, others) = working(format_name, cleaned), marks()
    done = work((0, JsonLinesBlock("rows.jsonl:", 1, lines(*rows))))
    chunk = done.chunk
    assert done.rows == len(rows) == len(chunk.numbers) + len(done.dropped)
    parts = 3 if format_name in PAIRS else 1
    position, lengths = 0, iter(chunk.lengths)
    assert len(chunk.lengths) == parts * len(chunk.numbers)
    for number in chunk.numbers:
        item = work.readings[0].read(json.loads(json.dumps(rows[number - 1])), "here")
        pieces = []
        for _ in range(parts):
            length = next(lengths)
            pieces.append((chunk.ids[position : position + length], chunk.supervised[position : position + length]))
            position += length
        assert sum(len(ids) for ids, _ in pieces) <= 512 * (2 if parts == 3 else 1)
        if isinstance(item, Conversation):
            ((ids, _),) = pieces
            turns = len(item.messages) + offers(item)
            assert (ids.count(start), ids.count(end)) == (turns, turns)
        elif isinstance(item, PreferencePair):
            (prompt, learned), *answers = pieces
            turns = len(item.prompt) + offers(item)
            assert (prompt.count(start), prompt.count(end)) == (turns + 1, turns), "and the header of the answer"
            assert not any(learned)
            for ids, trained in answers:
                assert (ids.count(start), ids.count(end), ids[-1], all(trained)) == (0, 1, end, True)
        elif format_name == "completion":
            ((ids, _),) = pieces
            assert (ids.count(start), ids.count(end), ids[-1]) == (0, 1, end)
        else:
            ((ids, trained),) = pieces
            assert tuple(ids) == item.input_ids
            assert [t if yes else -100 for t, yes in zip(ids, trained, strict=True)] == list(item.labels)
        if format_name != "pretokenized":
            assert all(others.isdisjoint(ids) for ids, _ in pieces)
    assert position == len(chunk.ids) == len(chunk.supervised)
    json.dumps([drop._asdict() for drop in done.dropped], ensure_ascii=False).encode()  # can be written down


@QUICK
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_nearly_valid_files(format_name, data):
    rows = data.draw(st.lists(nearly(format_name), min_size=1, max_size=3))
    prepared(under(format_name, lines(GOOD[format_name], *rows)), format_name in TALKS)


# --- (d) mappings ---

PATHS = [
    "a",
    "b",
    "a.0",
    "a.0.b",
    "a.b",
    "b.1.a",
    "0",
    "a.",
    ".a",
    ".",
    "",
    "dialogue",
    "persona",
    "a.²",
    "a.٣",
    "a.-1",
]
PATH_LISTS = st.lists(st.sampled_from(PATHS), max_size=3)
TEMPLATES = ["{a}", "{a}\n{b}", "{a.0.b}", "{}", "{{a}}", "{", "a", "", "{a.0}{a.0}", "<|im_end|>{a}", "{\n}"]
ROLES = ["system", "user", "assistant", "tool"]
NAMED = st.fixed_dictionaries(
    {"kind": st.sampled_from(["conversation", "instruction", "completion", "pretokenized", "preference", "choice"])},
    optional={
        **{key: PATH_LISTS for key in DataFormat.model_fields if key.endswith("_field")},
        "speakers": st.lists(st.sampled_from(ROLES), max_size=3),
        "prompt_template": st.sampled_from(TEMPLATES),
        "choice_fields": PATH_LISTS,
        "label_fields": PATH_LISTS,
        "labels": st.lists(st.sampled_from([1, 2, "a", True, 0.5]), max_size=3),
        "roles": st.dictionaries(st.sampled_from([*WORDS, "", "a"]), st.sampled_from(ROLES), max_size=4),
        "call_roles": st.lists(st.sampled_from(WORDS), max_size=2),
    },
)
LEAVES = st.sampled_from(["q", "a", "user", "assistant", "", 1, 2, None, [], {}])
INNER = st.sampled_from(["a", "b", "0", "role", "content"])
SHAPED = st.dictionaries(
    st.sampled_from(["a", "b", "0", "dialogue", "persona", ""]),
    st.recursive(
        LEAVES, lambda some: st.lists(some, max_size=3) | st.dictionaries(INNER, some, max_size=3), max_leaves=8
    ),
    min_size=1,
    max_size=4,
)
SPEAKERS = {
    "kind": "conversation", "messages_field": ["dialogue"], "role_field": ["role"], "content_field": ["content"],
    "speakers": ["user", "assistant"], "system_field": ["persona"],
}  # fmt: skip


def mapping(named, rows, method="sft"):
    """Rows under a format file; JSON is valid YAML."""
    text = named if isinstance(named, str) else json.dumps(named)
    data = {"packing": False} if method == "sft" else {}
    return Given(lines(*rows), method, {"format": "{here}/own.yaml"}, data, {"own.yaml": text})


@examples(15)
@given(NAMED, st.lists(SHAPED, min_size=1, max_size=3))
def test_any_format_file(named, rows):
    prepared(mapping(named, rows, "dpo" if named["kind"] in PAIRS else "sft"), named["kind"] in KINDS)


@QUICK
@given(
    st.lists(
        st.text(string.printable, max_size=6)
        | st.sampled_from(["kind: ", "completion\n", "text_field: [a]\n", "- ", "{"])
    ).map("".join)
)
def test_any_text_as_a_format_file(text):
    prepared(mapping(text, [{"a": "q"}]), turns=False)


TURNS = st.sampled_from(["q", "a", "", " ", "<|im_end|>", "\ud800"]) | VALUES


@QUICK
@given(st.lists(st.lists(TURNS | st.lists(TURNS, max_size=3), max_size=4) | VALUES, min_size=1, max_size=3),
       st.sampled_from(["s", "", ["s", "t"], [], None, 1]))  # fmt: skip
def test_any_alternating_texts(dialogues, persona):
    rows = [{"dialogue": dialogue, "persona": persona} for dialogue in (["q", "a"], *dialogues)]
    prepared(mapping(SPEAKERS, rows))


@QUICK
@given(st.sampled_from(TEMPLATES), st.lists(SHAPED | ROWS, min_size=1, max_size=3))
def test_any_prompt_template(template, rows):
    named = {"kind": "instruction", "prompt_template": template, "response_field": ["b", "a.0.b", "content"]}
    prepared(mapping(named, [{"a": "q", "b": "a"}, *rows]))


# --- and what else is read ---


@pytest.mark.parametrize("method", ["sft", "dpo"])
@QUICK
@given(st.data())
def test_any_row_that_a_reader_returns(method, data):
    format_name = "preference" if method == "dpo" else "messages"
    rows = data.draw(st.lists(VALUES | nearly(format_name), min_size=1, max_size=3))
    code = "def read(row):\n    return row['give']\n"
    source = {"format": "{here}/own.py:read"}
    given_rows = lines(*({"give": row} for row in (GOOD[format_name], *rows)))
    prepared(Given(given_rows, method, source, files={"own.py": code}), turns=False)  # plain texts are a shape too


@QUICK
@given(st.lists(ROWS | st.fixed_dictionaries({"prompt": VALUES}), min_size=1, max_size=3))
def test_any_evaluation_file(rows):
    asked = {"clean": {"decontaminate": {"files": ["{here}/eval.jsonl"]}}}
    sound = {"messages": "uno due tre quattro cinque"}
    prepared(Given(lines(GOOD["messages"]), data=asked, files={"eval.jsonl": lines(sound, *rows)}))


@QUICK
@given(VALUES.map(json.dumps) | st.text(max_size=20))
def test_any_tools_file(text):
    tools = text.encode("utf-8", "surrogatepass")
    source = {"tools_file": "{here}/tools.json"}
    prepared(Given(lines(GOOD["messages"]), source=source, data={"sequence_len": 4096}, files={"tools.json": tools}))
