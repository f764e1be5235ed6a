"""Formats: detected, named, adapted to a source, or an error that suggests one."""

import pytest

from nesso_tune import DataError, RecipeError
from nesso_tune.data.formats import DETECTED_FORMATS, PAIR_FORMATS, choose_format, load_format
from nesso_tune.recipes.sections import Source

MESSAGES = {"messages": [{"role": "user", "content": "a"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}]}
ALPACA = {"instruction": "a", "input": "", "output": "b"}
PREFERENCE = {"prompt": "a", "chosen": "b", "rejected": "c"}


def source(**keys):
    return Source.model_validate({"path": "data.jsonl"} | keys)


DETECTED = {
    "messages": (MESSAGES, "messages"),
    "conversation with role": ({"conversation": MESSAGES["messages"]}, "messages"),
    "conversations with role": ({"conversations": MESSAGES["messages"]}, "messages"),
    "sharegpt": (SHAREGPT, "sharegpt"),
    "alpaca": (ALPACA, "alpaca"),
    "prompt and response": ({"prompt": "a", "response": "b"}, "alpaca"),
    "question and answer": ({"question": "a", "answer": "b"}, "alpaca"),
    "preference": (PREFERENCE, "preference"),
    "preference without prompt": ({"chosen": MESSAGES["messages"], "rejected": MESSAGES["messages"]}, "preference"),
    "preference beside messages": ({**MESSAGES, **PREFERENCE}, "preference"),
}


@pytest.mark.parametrize(("row", "name"), DETECTED.values(), ids=DETECTED)
def test_auto_detects_the_format(row, name):
    assert choose_format(source(), [row]) == load_format(name)


def test_the_majority_of_rows_decides():
    rows = [ALPACA, SHAREGPT, SHAREGPT, {"messages": None}]
    assert choose_format(source(), rows) == load_format("sharegpt")


def test_a_source_can_name_its_own_columns_and_roles():
    row = {"dialogo": [{"chi": "utente", "testo": "a"}]}
    named = source(
        messages_field="dialogo", role_field="chi", content_field="testo", roles={"utente": "user", "bot": "assistant"}
    )
    data_format = choose_format(named, [row])
    assert (data_format.kind, data_format.messages_field, data_format.roles["utente"]) == (
        "conversation",
        ("dialogo",),
        "user",
    )


WRONG = {
    "nothing known": ({}, {"testo": "a"}, r"its format is not recognised \(its columns are testo\); name the columns"),
    "no columns": ({}, {}, r"its columns are none"),
    "typo": ({"format": "messages"}, {"mesages": []}, r"no column `messages` or .*; did you mean "),
    "far off": ({"format": "preference"}, {"x": 1}, r"no column `chosen`.*; name the column"),
    "many columns": ({}, {f"{i:03}": "x" for i in range(500)}, r"columns are 000, .*, 029, and 470 more\)"),
    "a long name": ({}, {"x" * 10**5: 1}, r"columns are x{40}\.\.\. \(100,000 characters\)\)"),
    "columns without messages": (
        {"format": "messages"}, SHAREGPT, r"are not of format messages .* they look like format sharegpt: set",
    ),
    "columns of other rows": ({"format": "messages"}, {"messages": "text"}, r"have the columns"),
    "no text": ({"format": "alpaca"}, {"instruction": 1, "output": 2}, r"but `instruction` is a number, not text"),
    "an answer that is a list": ({}, {"prompt": "a", "answer": ["b"]}, r"alpaca, but `answer` is a list, not text"),
    "messages that are a text": ({}, {"messages": "[{'role'"}, r"`messages` is a text, not .*; save it as JSON"),
    "no header": ({}, {"Chi sei?": "x", "Sono Nesso.": "y"}, r"if it is a table, its first line must name"),
    "columns of objects": ({}, {"a": {"b": 1, "c": 2}}, r"its columns are a \(an object with b, c\)"),
    "good and bad answers": (
        {}, {"messages": MESSAGES["messages"], "kto_tag": "False"}, r"has a `kto_tag`, .*kto_tag: \[true, false\]",
    ),
    "good and bad numbers": ({}, {"prompt": "a", "completion": "b", "label": 0}, r"where: \{label: 1\}"),
    "named column absent": ({"prompt_field": "a", "format": "alpaca"}, {"output": "x"}, r"no column `a`"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "row", "expected"), WRONG.values(), ids=WRONG)
def test_rows_of_another_format(keys, row, expected):
    with pytest.raises(DataError, match=expected):
        choose_format(source(**keys), [row])


def test_columns_that_only_some_rows_have():
    with pytest.raises(DataError, match="have the columns of format messages"):
        choose_format(source(format="messages"), [{"x": 1}, {"messages": "text"}])
    with pytest.raises(DataError, match="but no row has text in all of them"):
        choose_format(source(format="alpaca"), [{"instruction": "a"}, {"output": "b"}])


OWN = "kind: instruction\nprompt_field: [domanda]\nresponse_field: [risposta]\n"


def test_a_user_defined_format_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    assert choose_format(source(format=str(path)), [{"domanda": "a", "risposta": "b"}]).prompt_field == ("domanda",)
    path.write_text(OWN.replace("domanda", "quesito"))  # read again, not remembered
    assert load_format(str(path)).prompt_field == ("quesito",)


BAD = {
    "unknown key": (OWN + "answer_field: [x]\n", r":4: unknown key `answer_field`"),
    "unknown kind": (OWN.replace("instruction", "chat"), r":1: `kind` must be one of"),
    "unknown role": (OWN + "roles: {capo: boss}\n", r":4: "),
    "a blank name": (OWN.replace("[risposta]", "['']"), r":3: `response_field.0` must not be empty"),
    "a name that is null": (OWN.replace("[risposta]", "[null]"), r":3: `response_field.0` is not set"),
    "no template": (OWN + "prompt_template: ''\n", r":4: `prompt_template` must not be empty"),
    "given twice": (OWN + "kind: preference\n", r":4: `kind` is given twice"),
    "empty": ("", r":1: is not a section of keys"),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_an_invalid_format_file_is_reported_with_its_line(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load_format(str(path))


ROLES = "roles: {a: user, b: assistant}\n"
TOO_FEW = {  # file, its line, key
    "no answer": (OWN.replace("[risposta]", "[]"), 3, "response_field"),
    "no answer named": ("kind: instruction\nprompt_field: [a]\n", 1, "response_field"),
    "no messages": ("kind: conversation\nmessages_field: []\n" + ROLES, 2, "messages_field"),
    "no role": ("kind: conversation\nmessages_field: [a]\nrole_field: []\n" + ROLES, 3, "role_field"),
    "no text": ("kind: preference\nchosen_field: [a]\nrejected_field: [b]\ncontent_field: []\n", 4, "content_field"),
    "no ids": ("kind: pretokenized\nids_field: []\nlabels_field: [a]\n", 2, "ids_field"),
    "no labels": ("kind: pretokenized\nids_field: [a]\nmask_field: []\n", 3, "labels_field or mask_field"),
    "neither labels nor mask": ("kind: pretokenized\nids_field: [a]\n", 1, "labels_field or mask_field"),
    "no texts": ("kind: completion\ntext_field: []\n", 2, "text_field"),
    "one answer of two": (
        "kind: choice\nprompt_field: [a]\nlabel_fields: [c]\nchoice_fields: [b]\n", 4, "1 columns in choice_fields",
    ),
    "no vote": ("kind: choice\nprompt_field: [a]\nlabel_fields: []\nchoice_fields: [b, c]\n", 3, "label_fields"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "key"), TOO_FEW.values(), ids=TOO_FEW)
def test_a_format_that_names_too_few_columns(tmp_path, text, line, key):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"mine\.yaml:{line}: the format names .*{key}.*; name the column there"):
        choose_format(source(format=str(path)), [{"a": "x", "b": "y", "c": "z"}])


def test_message_keys_default_to_role_and_content(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("kind: conversation\nmessages_field: [dialogo]\n" + ROLES)
    data_format = choose_format(source(format=str(path)), [{"dialogo": [{"role": "a", "content": "x"}]}])
    assert (data_format.role_keys, data_format.content_keys) == (("role",), ("content",))


def test_an_unknown_format():
    with pytest.raises(RecipeError, match="did you mean `sharegpt`"):
        load_format("shareGPT4")
    with pytest.raises(RecipeError, match="use auto, alpaca, choice, completion, exchanges, hh_rlhf, messages, ms_sw"):
        load_format("zzzz")


def test_pair_formats_are_the_detected_ones_with_pairs():
    assert tuple(name for name in DETECTED_FORMATS if load_format(name).has_pairs) == PAIR_FORMATS
