"""Rows other than conversations: texts, token ids, labelled choices, nested columns, user-defined readers."""

import json

import pytest

from nesso_tune import DataError, RecipeError, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.recipes.sections import ChatSection, ModelSection


@pytest.fixture
def chat(base):
    return chat_tokenizer(ModelSection(base=base), ChatSection())


def only(data):
    """The single row of prepared data: its text and its supervised text."""
    (row,) = data.train
    backend = data.chat.backend
    learned = [label for label in row["labels"] if label != -100]
    return tuple(backend.decode(ids, skip_special_tokens=False) for ids in (row["input_ids"], learned))


def mapping(tmp_path, text):
    file = tmp_path / "shape.yaml"
    file.write_text(text)
    return str(file)


def said(text):
    """The turns of rendered ChatML."""
    return [
        turn.partition("\n")[::2] for turn in text.removesuffix("<|im_end|>\n")[12:].split("<|im_end|>\n<|im_start|>")
    ]


def test_a_plain_text_is_supervised_with_its_end_token(sft, write_rows, chat):
    data = prepare_data(sft({"path": write_rows([{"text": "C'era <|im_end|> una volta."}]), "format": "completion"}))
    (row,) = data.train
    assert row["input_ids"] == row["labels"]
    assert row["input_ids"][-1] == chat.eos_id
    assert row["input_ids"].count(chat.eos_id) == 1  # what the text spells is text
    assert only(data)[0] == "C'era <|im_end|> una volta.<|im_end|>"
    assert data.summary.anomalies["control_token_as_text"].rows == 1
    assert "1 row contains control tokens" in data.summary.warnings[0]
    silent = sft({"path": write_rows([{"text": "C'era."}]), "format": "completion"}, train_on_eos="none")
    assert prepare_data(silent).train[0]["labels"][-1] == -100


@pytest.mark.parametrize(
    ("row", "format"), [({"text": "a"}, "completion"), ({"input_ids": [5], "labels": [5]}, "pretokenized")]
)
def test_ambiguous_formats_are_never_detected(sft, write_rows, row, format):
    with pytest.raises(DataError, match=f"set format: {format} if they are of this kind"):
        prepare_data(sft(write_rows([row] * 3)))


def test_token_ids_are_used_unchanged(sft, write_rows, chat):
    ids = chat.backend.encode("Ciao, come va?", add_special_tokens=False).ids
    rows = [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "lang": "it"},
        {"input_ids": ids, "completion_mask": [0] * (len(ids) - 1) + [1]},
    ]
    report_of = prepare_data(sft({"path": write_rows(rows), "format": "pretokenized"}, packing=False))
    assert sorted((row["input_ids"], row["labels"]) for row in report_of.train) == sorted(
        [(ids, [-100, *ids[1:]]), (ids, [-100] * (len(ids) - 1) + ids[-1:])]
    )
    assert report_of.summary.languages.keys() == {"it", "und"}


CHOICE = {"input": "Più grande?", "output_1": "Il Po.", "output_2": "L'Adda."}


@pytest.mark.parametrize(
    ("label", "labels", "chosen"),
    [(1, [1, 2], "Il Po."), (2, [1, 2], "L'Adda."), ("2", [1, 2], "L'Adda."), (0, [0, 1], "Il Po."),
     (1, [0, 1], "L'Adda."), ("A", ["A", "B"], "Il Po."), (True, [True, False], "Il Po.")],
)  # fmt: skip
def test_a_label_decides_the_chosen_answer(dpo, write_rows, label, labels, chosen):
    data = prepare_data(dpo({"path": write_rows([{**CHOICE, "label": label}]), "format": "choice", "labels": labels}))
    (row,) = data.train
    assert data.chat.backend.decode(row["chosen_ids"]) == chosen


def test_the_meaning_of_labels_is_required(dpo, write_rows):
    with pytest.raises(
        DataError, match=r"the recipe does not say which answer each label prefers: label is 1; .*labels: \[1, 2\]"
    ):
        prepare_data(dpo({"path": write_rows([{**CHOICE, "label": 1}]), "format": "choice"}))


def test_votes(dpo, write_rows):
    votes = [(1, 1, 2), (2, 0, 2), (0, 0, 0), (1, 2, 0), (None, 2, None)]
    rows = [{**CHOICE, "input": f"{i}?", "a": a, "b": b, "c": c} for i, (a, b, c) in enumerate(votes)]
    source = {"path": write_rows(rows), "format": "choice", "label_fields": ["a", "b", "c"], "labels": [1, 2]}
    data = prepare_data(dpo(source))
    assert data.summary.dropped == {"no_preferred_answer": 2}
    decoded = [[data.chat.backend.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen")] for row in data.train]
    assert {prompt[prompt.index("?") - 1]: chosen for prompt, chosen in decoded} == {
        "0": "Il Po.", "1": "L'Adda.", "4": "L'Adda.",
    }  # fmt: skip


def test_dotted_names_descend_into_objects_and_lists(sft, write_rows):
    row = {"q": {"text": "Chi?"}, "answers": [{"text": "Io."}, {"text": "Tu."}]}
    source = {
        "path": write_rows([row]),
        "format": "alpaca",
        "prompt_field": "q.text",
        "response_field": "answers.1.text",
    }
    assert said(only(prepare_data(sft(source)))[0]) == [("user", "Chi?"), ("assistant", "Tu.")]


def test_a_prompt_template(sft, write_rows, tmp_path):
    shape = mapping(tmp_path, 'kind: instruction\nprompt_template: "{a.b}: {c}"\nresponse_field: [d]\n')
    rows = [{"a": {"b": "{{x}} {c}"}, "c": "sì", "d": "no"}, {"a": {"b": "y"}, "d": "no"}]
    data = prepare_data(sft({"path": write_rows(rows), "format": shape}))
    assert said(only(data)[0])[0] == ("user", "{{x}} {c}: sì")  # braces of the data are text
    assert data.summary.dropped == {"missing_field": 1}


@pytest.mark.parametrize("turns", [["Ciao", "Salve", "Bene?", "Sì"], [["Ciao", "Salve"], ["Bene?", "Sì"]]])
def test_texts_of_alternating_speakers(sft, write_rows, tmp_path, turns):
    shape = mapping(
        tmp_path,
        "kind: conversation\nmessages_field: [dialogue]\nrole_field: [role]\ncontent_field: [content]\n"
        "speakers: [user, assistant]\nsystem_field: [persona]\n",
    )
    rows = [{"dialogue": turns, "persona": ["Sono gentile.", "Ho due cani."]}]
    text, learned = only(prepare_data(sft({"path": write_rows(rows), "format": shape})))
    assert said(text)[0] == ("system", "Sono gentile.\nHo due cani.")
    assert [role for role, _ in said(text)[1:]] == ["user", "assistant"] * 2
    assert learned == "Salve<|im_end|>Sì<|im_end|>"


def test_reasoning_and_calls_as_parts(sft, write_rows):
    parts = [
        {"type": "reasoning", "value": "Serve il meteo."},
        {"type": "text", "text": "Guardo."},
        {"type": "tool_call", "value": '{"name": "meteo", "arguments": {"dove": "Roma"}}'},
    ]
    row = {"messages": [{"role": "user", "content": "Piove?"}, {"role": "assistant", "content": parts}]}
    _, learned = only(prepare_data(sft(write_rows([row]), chat={"template": "qwen3"}, reasoning="keep")))
    call = '<tool_call>\n{"name": "meteo", "arguments": {"dove": "Roma"}}\n</tool_call>'
    assert learned == f"<think>\nServe il meteo.\n</think>\n\nGuardo.\n{call}<|im_end|>"


def test_the_tools_file_applies_to_rows_without_tools(sft, write_rows, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "meteo", "parameters": {}}]))
    own = [{"name": "orario", "parameters": {}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns, "tools": own}]
    source = {"path": write_rows(rows), "tools_file": str(tmp_path / "tools.json")}
    data = prepare_data(sft(source, packing=False, sequence_len=1024))
    texts = [data.chat.backend.decode(row["input_ids"]) for row in data.train]
    assert sorted("meteo" in text for text in texts) == [False, True]
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "metro", "parameters": {}}]))
    assert not prepare_data(sft(source, packing=False, sequence_len=1024)).summary.cache_hit


def test_where_selects_rows(sft, write_rows):
    rows = [{"prompt": f"{i}?", "response": f"{i}.", "from": name, "ok": i > 1, "n": i}
            for i, name in enumerate(["a", "b", "a", "c"])]  # fmt: skip
    path = write_rows(rows)
    for where, kept in (({"from": "a"}, 2), ({"from": ["a", "c"]}, 3), ({"ok": True, "from": "a"}, 1), ({"n": 1}, 1)):
        report = prepare_data(sft({"path": path, "where": where})).report
        assert (report["rows_kept"], report["dropped"]) == (kept, {"not_selected": 4 - kept})
    with pytest.raises(DataError, match=r"no row matches `where` \(from: z\)"):
        prepare_data(sft({"path": path, "where": {"from": "z"}}))


READER = """\
from nesso_tune import Conversation, Message, PreferencePair

def faq(row):
    return {"prompt": row["q"], "response": row["a"][0]} if row["a"] else None

def spoken(row):
    return Conversation([Message("user", row["q"]), Message("assistant", row["a"][0], train=True)], language="it")

def pair(row):
    return PreferencePair([Message("user", row["q"])], Message("assistant", row["a"][0]), Message("assistant", "Boh."))

def wrong(row):
    return Conversation([Message("narrator", row["q"])])

def shapeless(row):
    return {"x": 1}

def number(row):
    return 7
"""
ROWS = [{"q": "Chi?", "a": ["Io.", "Tu."]}, {"q": "Che?", "a": []}]


def test_a_user_defined_reader(sft, dpo, write_rows, tmp_path):
    file = tmp_path / "readers.py"
    file.write_text(READER)
    source = {"path": write_rows(ROWS), "format": f"{file}:faq"}
    data = prepare_data(sft(source))
    assert said(only(data)[0]) == [("user", "Chi?"), ("assistant", "Io.")]
    assert data.summary.dropped == {"left_out_by_reader": 1}
    assert prepare_data(sft(source)).summary.cache_hit
    file.write_text(READER.replace('row["a"][0]} if', 'row["a"][1]} if'))  # another function: another result
    assert said(only(prepare_data(sft(source)))[0])[1] == ("assistant", "Tu.")
    one = write_rows(ROWS[:1], "one.jsonl")
    assert prepare_data(sft({"path": one, "format": f"{file}:spoken"})).summary.languages.keys() == {"it"}
    assert prepare_data(dpo({"path": one, "format": f"{file}:pair"})).summary.rows_kept == 1


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("faqs", RecipeError, r"has no function `faqs`; did you mean `faq`\?"),
        ("shapeless", DataError, r"one.jsonl:1: .*:shapeless returned a row with x; return messages, or prompt and"),
        ("number", DataError, r"one.jsonl:1: .*:number returned int; return a dict"),
        ("pair", DataError, r"one.jsonl:1: a PreferencePair is not for method sft"),
        ("wrong", DataError, r"none of 1 rows can be used \(unknown_role: 1, e.g. .*one.jsonl:1: `narrator`\)"),
        ("spoken2", RecipeError, "did you mean `spoken`"),
    ],
)
def test_faults_of_a_reader(sft, write_rows, tmp_path, function, error, says):
    file = tmp_path / "readers.py"
    file.write_text(READER)
    with pytest.raises(error, match=says):
        prepare_data(sft({"path": write_rows(ROWS[:1], "one.jsonl"), "format": f"{file}:{function}"}))


def test_a_reader_that_raises_names_the_row(sft, write_rows, tmp_path):
    file = tmp_path / "readers.py"
    file.write_text(READER)
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*:spoken raised IndexError: .*; correct the function"):
        prepare_data(sft({"path": write_rows(ROWS), "format": f"{file}:spoken"}))
    file.write_text("import nothing_of_this_name")
    with pytest.raises(RecipeError, match=r"readers.py cannot be loaded \(ModuleNotFoundError"):
        prepare_data(sft({"path": write_rows(ROWS), "format": f"{file}:faq"}))
