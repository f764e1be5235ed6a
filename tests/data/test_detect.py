"""Detection for `init`: format, columns, languages."""

import json
from itertools import pairwise

import pytest

from nesso_tune import DataError, prepare_data
from nesso_tune.data.column_inference import infer_format
from nesso_tune.data.detect import detect_source, sample_records
from nesso_tune.data.record_reader import make_record_reader
from nesso_tune.recipes.sections import Source
from tests.data.test_real import shared

IT = [f"Qual è la capitale della regione numero {i}, per favore? Grazie mille." for i in range(30)]
EN = [f"What is the capital of region number {i}, please? Thank you very much." for i in range(30)]


def asked(texts, **more):
    return [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}], **more} for t in texts]


LANGUAGES = {
    "each row says it": (asked(IT, lang="it") + asked(EN, lang="en"), None, {"it": 0.5, "en": 0.5}),
    "one, told": (asked(IT), "it", {"it": 1.0}),
    "two, told": (asked(IT) + asked(EN), "auto", {"it": 0.5, "en": 0.5}),
    "nearly one": (asked(IT) + asked(EN[:1]), "it", {"it": 30 / 31, "en": 1 / 31}),
    "nearly one, and rows that say nothing": (asked(IT) + asked(["42", "7 + 7"]), "it", {"it": 30 / 32, "und": 2 / 32}),
    "some rows say it": (asked(IT, language="it") + asked(EN), "auto", {"it": 0.5, "en": 0.5}),
    "none can be told": (asked(["42"] * 5), "auto", {"und": 1.0}),
}


@pytest.mark.parametrize(("rows", "says", "shares"), LANGUAGES.values(), ids=LANGUAGES)
def test_languages(write_rows, rows, says, shares):
    found = detect_source(write_rows(rows))
    assert found.language == says
    assert found.languages == pytest.approx(shares)
    assert (found.method, found.format, found.rows, found.usable) == ("sft", "messages", len(rows), 1.0)


def turns(role, text, *names):
    return [{role: name, text: f"testo lungo {i}", "id": i} for i, name in enumerate(names)]


SHAPES = {
    "Italian keys": (
        {"dialogo": turns("ruolo", "testo", "sistema", "utente", "assistente")}, "messages",
        {"messages_field": "dialogo", "role_field": "ruolo", "content_field": "testo",
         "roles": {"sistema": "system", "utente": "user", "assistente": "assistant"}},
    ),
    "speakers": (
        {"chat": turns("speaker", "utterance", "Human", "Bot"), "n": 3}, "messages",
        {"messages_field": "chat", "role_field": "speaker", "content_field": "utterance",
         "roles": {"Human": "user", "Bot": "assistant"}},
    ),
    "Italian columns": ({"domanda": "a", "risposta": "b"}, "alpaca",
                        {"prompt_field": "domanda", "response_field": "risposta"}),
    "capitals": ({"Question": "a", "Answer": "b", "Id": "x"}, "alpaca",
                 {"prompt_field": "Question", "response_field": "Answer"}),
    "preferred": ({"query": "a", "preferred": "b", "dispreferred": "c"}, "preference",
                  {"chosen_field": "preferred", "rejected_field": "dispreferred", "prompt_field": "query"}),
    "texts in an object, as Argilla writes them": (
        {"id": "1", "fields": {"instruction": "a", "response": "b"}, "responses": {"quality": [{"value": "good"}]}},
        "alpaca", {"prompt_field": "fields.instruction", "response_field": "fields.response"},
    ),
    "the rows of a hub's viewer": (
        {"row_idx": 0, "row": {"prompt": "a", "chosen": "b", "rejected": "c"}, "truncated_cells": []}, "preference",
        {"chosen_field": "row.chosen", "rejected_field": "row.rejected", "prompt_field": "row.prompt"},
    ),
    "whole dialogues": ({"better": turns("role", "content", "user"), "worse": turns("role", "content", "user")},
                        "preference", {"chosen_field": "better", "rejected_field": "worse"}),
}  # fmt: skip


@pytest.mark.parametrize(("row", "name", "fields"), SHAPES.values(), ids=SHAPES)
def test_columns_with_other_names_are_inferred(row, name, fields):
    assert infer_format([row] * 3) == (name, fields)


def test_ids_and_context_are_distinguished_from_texts():
    long_id = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
    turns_with_ids = [{"who": "user", "body": "Ciao", "id": long_id}, {"who": "assistant", "body": "Sì", "id": long_id}]
    assert infer_format([{"dialog": turns_with_ids}])[1]["content_field"] == "body"
    row = {"contesto": "c", "domanda": "q", "risposta": "r", "lingua": "it", "fonte": "wiki"}
    assert infer_format([row])[1] == {
        "prompt_field": "domanda", "response_field": "risposta", "input_field": "contesto", "language_field": "lingua",
    }  # fmt: skip


def test_unread_columns_are_counted(write_rows):
    rows = [{"domanda": "Come va?", "risposta": "Va bene, grazie.", "fonte": "wiki", "voto": 3}] * 3
    assert detect_source(write_rows(rows)).unread == {"fonte": 3, "voto": 3}
    found = detect_source(write_rows(asked(IT[:3], source="a book")))
    assert (found.unread, found.unread_texts) == ({"source": 3}, {"source": 3})


@pytest.mark.parametrize(("good", "bad"), [(True, False), ("True", "false"), (1, 0)])
def test_only_the_good_of_labelled_answers_are_kept(write_rows, sft, caplog, good, bad):
    rows = [{"prompt": f"q {i}", "completion": "a", "label": bad if i % 3 else good} for i in range(9)]
    path = write_rows(rows)
    with pytest.raises(DataError, match=r"each answer has a `label`, .*KTO, .*; keep the good ones"):
        prepare_data(sft(path))
    found = detect_source(path)
    assert "answers are labelled good or bad (`label`, as for KTO" in caplog.text
    assert (found.rows, found.usable, found.unread) == (3, 1.0, {})
    assert prepare_data(sft({"path": path, "format": found.format, **found.fields})).summary.rows_kept == 3
    with pytest.raises(DataError, match="none of 2 is good"):
        detect_source(write_rows([{**rows[1], "prompt": f"q {i}"} for i in range(2)], "bad.jsonl"))


def test_the_faults_that_a_recipe_would_meet_are_found(write_rows):
    twice = [[{"role": role, "content": f"a {i}"} for role in ("user", "user", "assistant")] for i in range(4)]
    found = detect_source(write_rows([{"messages": turns} for turns in twice]))
    assert (found.merge_turns, found.usable, found.dropped) == (True, 1.0, {})
    found = detect_source(write_rows([*asked(IT[:4]), {"messages": twice[0]}]))
    assert (found.merge_turns, found.dropped) == (False, {"roles_out_of_order": 1})
    masked = [{"messages": [*twice[0][1:2], {**twice[0][2], "weight": 0}]}] * 3
    with pytest.raises(DataError, match=r"none of 3 rows .*nothing_to_learn: 3.*; check data.roles_to_train, and the"):
        detect_source(write_rows(masked))
    other = [[{"role": "user", "content": "b"}, *turns[2:]] for turns in twice]
    pairs = [{"chosen": turns[1:], "rejected": prompt} for turns, prompt in zip(twice, other, strict=True)]
    with pytest.raises(DataError, match=r"looks like format preference, but none of 4 rows .*no_common_prompt: 4"):
        detect_source(write_rows(pairs))
    arena = [{"conversation_a": turns[1:], "conversation_b": turns[1:], "winner": "model_a"} for turns in twice]
    with pytest.raises(DataError, match="its format is not recognised"):
        detect_source(write_rows(arena))


def test_a_given_column_that_no_row_has(write_rows):
    path = write_rows([{"q": "Chi sei?", "a": "Nesso."}] * 3)
    for given in ({}, {"format": "alpaca"}):
        source = Source(path=path, prompt_field="qq", response_field="a", **given)
        with pytest.raises(DataError, match="no column `qq`"):
            detect_source(path, source)


def test_lengths_include_calls_and_tools(write_rows):
    call = [{"name": "f", "arguments": {"a": "x" * 5000}}]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": call}]}]
    assert detect_source(write_rows(rows)).characters[0] > 5000
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f", "description": "x" * 5000}]}]
    assert detect_source(write_rows(pairs)).characters[0] > 5000


NOTHING = [
    {"text": "a"}, {"a": 1, "b": 2}, {"question": "a"}, {"answer": "b"}, {"chat": ["a", "b"]},
    {"source": "wikipedia", "risposta": "a"}, {"chat": turns("who", "what", "Anna", "Bruno")}, {"chosen": "a"},
    {"dialog": [{"role": "user", "content": [{"type": "text"}]}]}, {"premise": "a", "hypothesis": "b"},
]  # fmt: skip


@pytest.mark.parametrize("row", NOTHING)
def test_nothing_is_inferred_from_unknown_columns(row, write_rows):
    assert infer_format([row] * 3) is None
    with pytest.raises(DataError, match=r"its format is not recognised \(its columns are .*prompt_field"):
        detect_source(write_rows([row] * 3))


def test_inferred_columns_can_be_prepared(write_rows, sft):
    rows = [{"dialogo": turns("ruolo", "testo", "utente", "assistente")} for _ in range(4)]
    found = detect_source(path := write_rows(rows))
    source = {"path": path, "format": found.format, **found.fields}
    assert prepare_data(sft(source)).summary.rows_kept == 4


def test_unusable_rows_are_counted(write_rows):
    rows = asked(IT[:6]) + [{"messages": [{"role": "user", "content": "a"}]}] * 2
    found = detect_source(write_rows(rows))
    assert (found.usable, found.dropped) == (0.75, {"no_assistant_turn": 2})
    with pytest.raises(DataError, match=r"looks like format messages, but none of 2 rows can be used"):
        detect_source(write_rows(rows[-2:]))


def test_tools_are_detected(write_rows):
    calls = [{"name": "f", "arguments": {}}]
    rows = asked(IT[:3]) + asked(IT[:1], tools=[{"name": "f"}])
    rows[0]["messages"][1]["tool_calls"] = calls
    assert detect_source(write_rows(rows)).tools == 0.5


def test_the_sample_covers_the_whole_file(tmp_path, monkeypatch):
    rows = [{"i": i, "pad": "x" * (i % 50)} for i in range(5000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for large in (10**9, 1):  # read whole, and by place
        monkeypatch.setattr("nesso_tune.data.detect.OFFSET_SAMPLING_BYTES", large)
        sample = [row["i"] for row in sample_records(Source(path=str(path)), 100)]
        assert len(sample) == pytest.approx(100, abs=2)
        assert sample[0] == 0
        assert max(sample) > 4900
        assert max(b - a for a, b in pairwise(sample)) < 120
    (tmp_path / "other.jsonl").write_text('{"i": 1}\n')
    monkeypatch.setattr("nesso_tune.data.detect.OFFSET_SAMPLING_BYTES", 10**9)
    assert len(sample_records(Source(path=str(tmp_path / "*.jsonl")), 10)) == 10


REAL = {
    "messages": ("bench/sft.jsonl", "", ("sft", "messages", None), {"it", "en"}),
    "pairs": ("bench/pref.jsonl", "", ("dpo", "preference", None), {"it", "en"}),
    "sharegpt pairs": ("data/pref_en.jsonl", "llamafactory", ("dpo", "preference", "en"), {"en"}),
    "tools": ("data/toolcall.jsonl", "glaive", ("sft", "sharegpt", "en"), {"en"}),
    "alpaca": ("data/sft_en.jsonl", "gsm8k", ("sft", "alpaca", "en"), {"en"}),
    "roleplay": ("data/sft_en.jsonl", "gpteacher", ("sft", "alpaca", "en"), {"en"}),
    "sharegpt": ("data/sft_multiturn.jsonl", "fastchat", ("sft", "sharegpt", "en"), {"en"}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "prefix", "expected", "main"), REAL.values(), ids=REAL)
def test_real_files(name, prefix, expected, main, tmp_path):
    with open(shared(name), encoding="utf-8") as stream:
        lines = [line for line in stream if json.loads(line).get("_source", "").startswith(prefix)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    found = detect_source(str(path))
    assert (found.method, found.format, found.language) == expected
    assert sum(found.languages[code] for code in main) > 0.95
    assert found.usable > 0.95
    assert found.rows == len(lines)


CHOSEN = {"question": "Più lungo?", "answer_a": "Il Po.", "answer_b": "L'Adda.", "winner": "a"}
VOTED = {"instruction": "Più lungo?", "response1": "Il Po.", "response2": "L'Adda.", "label": 2, "idx": 1}


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ([CHOSEN, {**CHOSEN, "winner": "b"}],
         {"prompt_field": "question", "choice_fields": ["answer_a", "answer_b"], "label_fields": ["winner"],
          "labels": ["a", "b"]}),
        ([VOTED, {**VOTED, "label": 1}, {**VOTED, "label": 3}],
         {"prompt_field": "instruction", "choice_fields": ["response1", "response2"], "label_fields": ["label"],
          "labels": [1, 2]}),
    ],
)  # fmt: skip
def test_two_answers_with_a_label(write_rows, rows, fields):
    path = write_rows(rows * 5)
    found = detect_source(path)
    assert (found.method, found.format, found.fields) == ("dpo", "choice", fields)
    assert "response1" not in found.unread
    with pytest.raises(DataError, match=r"probably format: choice, prompt_field: .*labels: \["):
        make_record_reader(Source(path=path), "dpo")


@pytest.mark.parametrize("labels", [[1], [0, 1, 2], ["x", "y"]])
def test_ambiguous_labels_are_not_inferred(write_rows, labels):
    with pytest.raises(DataError, match="not recognised"):
        detect_source(write_rows([{**VOTED, "label": label} for label in labels]))
