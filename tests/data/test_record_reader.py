"""Choosing a reader by the first rows of a source, cleaning, duplicates and decontamination."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune import Conversation, DataError, Message, prepare_data
from nesso_tune.data.cleaning import INVISIBLE_CHARACTERS, clean, merge_consecutive_turns, role_order_fault
from nesso_tune.data.columns import as_number, is_equal
from nesso_tune.data.convert import Unusable
from nesso_tune.data.filtering import find_near_duplicates, minhash_signature
from nesso_tune.data.prepare import dropped_file
from nesso_tune.data.record_reader import make_record_reader
from nesso_tune.recipes.sections import CleanSection, Source
from tests.support.examples import examples

SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "w"}, {"from": "human", "value": "e"}]
PAIR = {"conversations": SAID, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
WRONG = {
    "pairs, detected": ({}, PAIR, "sft", "contains preference pairs, but SFT needs conversations; use method: dpo"),
    "the dialogue of pairs": ({"format": "sharegpt"}, PAIR, "sft", "contains preference pairs"),
    "pairs as messages": ({"format": "messages"}, PAIR, "sft", "they look like format preference .preference pairs"),
    "pairs as alpaca": ({"format": "alpaca"}, TEXTS, "sft", "they look like format preference"),
    "chats for dpo": ({}, CHAT, "dpo", "contains conversations, but DPO needs a chosen and a rejected answer"),
    "chats as pairs": ({"format": "preference"}, CHAT, "dpo", "they look like format messages: set format: messages"),
    "columns with other names": (
        {}, {"domanda": "q", "risposta": "a"}, "sft",
        "name its columns, probably format: alpaca, prompt_field: domanda, response_field: risposta",
    ),
    "nothing known": ({}, {"a": [{"x": 1}], "b": 2}, "sft", r"its columns are a \(a list of objects with x\), b"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "row", "method", "says"), WRONG.values(), ids=WRONG)
def test_rows_of_another_kind(write_rows, keys, row, method, says):
    with pytest.raises(DataError, match=says):
        make_record_reader(Source(path=write_rows([row] * 3), **keys), method)


VALUES = {  # of a column, and of the recipe: whether they are equal
    "1 1": True, "1.0 1": True, '"1" 1': True, '" 1,0" 1': True, '1 "1"': True, '"1.50" 1.5': True, '"a " "a"': True,
    '"TRUE" true': True, 'true "true"': True, "true true": True, "null null": True, '"-2e3" -2000': True,
    "true 1": False, "1 true": False, '"1" true': False, '"1" 2': False, '"one" 1': False, '"" 0': False,
    "null 0": False,
    '"36028797018963967" 36028797018963968': False,
    '"1.234,5" 1234.5': False, '"a" "b"': False, "[1] 1": False, '"nan" 0': False, '"1_0" 10': False,
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
def test_a_value_equals_its_text(values):
    value, wanted = (json.JSONDecoder().raw_decode(values)[0], json.loads(values.split(" ")[-1]))
    assert is_equal(value, wanted) is VALUES[values]


@given(st.one_of(st.integers(), st.floats(-1e15, 1e15)))
@examples(100)
def test_the_text_of_a_number_is_the_number(number):
    assert as_number(str(number)) == as_number(str(number).replace(".", ",")) == number


def test_numbers_of_a_csv_file_are_compared_as_numbers(sft, tmp_path):
    file = tmp_path / "rows.csv"
    rows = [f"domanda {i};risposta {i};{i % 2 == 0};{i % 3};0,{i}" for i in range(10)]
    file.write_text("prompt;response;good;kind;score\n" + "\n".join(rows) + "\n")
    source = {"path": str(file), "where": {"good": True, "kind": [0, 1]}, "score_field": "score", "min_score": 0.35}
    report = prepare_data(sft(source, validation_size=0)).report
    assert report["dropped"] == {"not_selected": 7, "below_min_score": 1}  # 0, 4 and 6 are selected; 0,0 < 0.35
    assert report["rows_kept"] == 2


ON_PURPOSE = {
    "the chosen answers alone": ({"format": "alpaca", "response_field": "chosen"}, TEXTS),
    "the dialogue alone": ({"format": "sharegpt", "messages_field": "conversations"}, PAIR),
}


@pytest.mark.parametrize(("keys", "row"), ON_PURPOSE.values(), ids=ON_PURPOSE)
def test_columns_that_the_recipe_names(write_rows, keys, row):
    reader = make_record_reader(Source(path=write_rows([row] * 3), **keys), "sft")
    assert reader.data_format.kind != "preference"


WORDS = [a + b for a in ("ca", "me", "to", "ri", "lu", "fa", "no", "se") for b in ("sa", "ne", "li", "go", "va", "pi")]


def chat(*turns):
    return Conversation(tuple(Message(role, content) for role, content in turns))


def of(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_invisible_characters_and_unicode_form():
    item = chat(("user", "e\u0300\u200b?\x07"), ("assistant", "perche\u0301\tsi\n"))
    done = clean(item, CleanSection(unicode="nfc", invisible="remove"))
    assert [turn.content for turn in done.messages] == ["è?", "perché\tsi\n"]
    assert clean(item, CleanSection()) is item


@pytest.mark.parametrize("kept", ["👨\u200d👩", "می\u200cخواهم", "क्\u200dष", "a\tb\r\nc", "«è»", "😀\ufe0f"])
def test_meaningful_joiners_are_kept(kept):
    assert INVISIBLE_CHARACTERS.sub("", kept) == kept


@examples(100)
@given(st.text())
def test_cleaning_is_idempotent(text):
    once = clean(chat(("user", "q"), ("assistant", f"x{text}")), CleanSection(unicode="nfc", invisible="remove"))
    assert clean(once, CleanSection(unicode="nfc", invisible="remove")) == once


def test_an_answer_of_invisible_characters_is_empty():
    with pytest.raises(Unusable, match="empty_answer"):
        clean(chat(("user", "q"), ("assistant", "\u200b\ufeff")), CleanSection(invisible="remove"))


ORDERS = {
    "fine": ("system user assistant user assistant", None),
    "a greeting first": ("assistant user assistant", None),
    "two questions": ("user user assistant", "user twice in a row"),
    "two answers": ("user assistant assistant", "assistant twice in a row"),
    "a late system": ("user system assistant", "system after user"),
    "two systems": ("system system user assistant", "system twice in a row"),
    "a result of nothing": ("user tool assistant", "a tool's result without a call"),
    "a result after plain words": ("user assistant tool assistant", "a tool's result without a call"),
    "results of two calls": ("user call tool tool assistant", None),
    "a result after another question": ("user call user tool", "a tool's result without a call"),
}


@pytest.mark.parametrize(("roles", "fault"), ORDERS.values(), ids=ORDERS)
def test_the_order_of_roles(roles, fault):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    turns = [("assistant", call) if role == "call" else (role, "x") for role in roles.split()]
    messages = chat(*turns).messages
    assert role_order_fault(messages) == fault
    if fault is not None:
        with pytest.raises(Unusable, match="roles_out_of_order"):
            clean(chat(*turns), CleanSection())
    assert clean(chat(*turns), CleanSection(role_order="keep")).messages == messages


def test_consecutive_turns_of_a_role_are_merged():
    turns = chat(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")).messages
    assert [(m.role, m.content) for m in merge_consecutive_turns(turns)] == [
        ("user", "a\n\nb"),
        ("assistant", "c\n\nd"),
    ]
    with pytest.raises(Unusable, match="roles_out_of_order"):  # what merging does not mend
        clean(chat(("user", "a"), ("system", "s"), ("assistant", "c")), CleanSection(role_order="merge"))


def test_empty_turns():
    item = chat(("system", " "), ("user", "a"), ("assistant", "b"))
    assert clean(item, CleanSection(empty_turns="remove")).messages == item.messages[1:]
    with pytest.raises(Unusable, match="empty_turn"):
        clean(item, CleanSection(empty_turns="drop"))


def test_exact_duplicates_are_counted_and_optionally_dropped(sft, write_rows, chats):
    rows = [*chats, {**chats[3], "language": "xx"}, of(("user", "Altro?"), ("assistant", "No.")), chats[0]]
    path = write_rows(rows)
    kept = prepare_data(sft(path)).report
    assert (kept["duplicates"], kept["rows_kept"]) == (2, 13)
    assert "2 rows repeat an earlier row: data.clean.duplicates: drop" in " ".join(kept["warnings"])
    data = prepare_data(sft(path, clean={"duplicates": "drop"}))
    assert data.summary.dropped == {"duplicate": 2}
    assert (data.summary.duplicates, data.summary.rows_kept, data.summary.train.rows) == (0, 11, 11)
    listed = [json.loads(line) for line in dropped_file(data).read_text().splitlines()]
    assert listed == [
        {"where": f"{path}:11", "reason": "duplicate", "detail": f"of {path}:4"},
        {"where": f"{path}:13", "reason": "duplicate", "detail": f"of {path}:1"},
    ]


def texts(count, words=60, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def test_near_duplicates(sft, write_rows):
    one, two, three = texts(3)
    almost = one.replace(one.split()[30], "altro", 1)
    rows = [of(("user", "q"), ("assistant", text)) for text in (one, two, almost, three, f"{two} fine")]
    data = prepare_data(sft(write_rows(rows), sequence_len=2048, clean={"near_duplicates": 0.8}))
    assert data.summary.dropped == {"near_duplicate": 2}
    assert [data.train.documents.location(i).rpartition(":")[2] for i in data.train.documents.kept] == ["1", "2", "4"]


def signature_of(example):
    return np.frombuffer(minhash_signature(example), np.uint32)


def test_signatures_estimate_the_jaccard_similarity():
    """Compared with the exact Jaccard similarity of the shingles; the standard error is below 0.045."""
    base = texts(1, words=200)[0].split()
    for changed in (0, 5, 20, 60):
        words = [*base[changed:], *texts(1, words=changed, seed=changed)[0].split()] if changed else list(base)
        shingles = [{" ".join(w[i : i + 3]) for i in range(len(w) - 2)} for w in (base, words)]
        exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        first, second = (signature_of(chat(("assistant", " ".join(w)))) for w in (base, words))
        assert abs((first == second).mean() - exact) < 0.15


def test_all_near_duplicates_are_found():
    rng = random.Random(3)
    originals = [text.split() for text in texts(40, words=120)]
    copies = [[*words[:-2], *rng.choices(WORDS, k=2)] for words in originals]
    every = [chat(("assistant", " ".join(words))) for words in [*originals, *copies]]
    earlier = find_near_duplicates(np.stack([signature_of(item) for item in every]), 0.7)
    assert earlier[:40].tolist() == [-1] * 40
    assert earlier[40:].tolist() == list(range(40))


def test_held_out_rows_are_not_trained_on(sft, write_rows, chats):
    held = write_rows([of(("user", "Qual è la capitale d'Italia?"), ("assistant", "Roma!"))], "held.jsonl")
    sources = {"validation_sources": [{"path": held}]}
    kept = prepare_data(sft(write_rows(chats), **sources)).report
    assert (kept["validation_overlap"], kept["train"]["rows"]) == (1, 10)
    assert "1 row shares a prompt with a validation row" in kept["warnings"][0]
    left = prepare_data(sft(write_rows(chats), **sources, clean={"validation_overlap": "drop"})).report
    assert (left["validation_overlap"], left["train"]["rows"], left["warnings"]) == (1, 9, [])
    assert left["cache_hit"]


def contaminated(sft, write_rows, rows, evaluations, **settings):
    against = {"files": [write_rows(evaluations, "eval.jsonl")], **settings}
    report = prepare_data(sft(write_rows(rows), sequence_len=2048, clean={"decontaminate": against})).report
    return report["dropped"].get("contains_evaluation_text", 0), report


def test_evaluation_texts_are_found(sft, write_rows):
    question, other, harmless = texts(3, words=20)
    rows = [
        of(("user", f"Prima. {question.upper()}! Dopo."), ("assistant", "a")),
        of(("user", "q"), ("assistant", f"{harmless}, {other}")),
        of(("user", harmless), ("assistant", "a")),
        of(("user", " ".join(question.split()[:9])), ("assistant", "9 of 20 words")),
        of(("user", "quattro parole sono poche"), ("assistant", "a")),
    ]
    evaluations = [{"prompt": question}, {"messages": [{"role": "user", "content": other}]}, {"question": "sono poche"}]
    found, report = contaminated(sft, write_rows, rows, evaluations)
    assert found == 2
    assert report["examples_of_dropped"]["contains_evaluation_text"].endswith("eval.jsonl:1")
    assert contaminated(sft, write_rows, rows, evaluations, overlap=0.4)[0] == 3
    assert contaminated(sft, write_rows, rows, [{"prompt": "quattro parole sono poche"}, *evaluations])[0] == 3
    assert contaminated(sft, write_rows, rows, [{"text": question}], fields=["text"])[0] == 1
