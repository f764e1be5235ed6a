"""Formats are found by themselves, named, adapted, or told apart with a hint."""

import pytest

from nesso_tune import DataError, RecipeError
from nesso_tune.data.formats import choose_format, load_format
from nesso_tune.recipes.data import Source

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
def test_auto_finds_the_format(row, name):
    assert choose_format(source(), [row]) == load_format(name)


def test_most_rows_decide():
    rows = [ALPACA, SHAREGPT, SHAREGPT, {"messages": None}]
    assert choose_format(source(), rows) == load_format("sharegpt")


def test_a_source_can_name_its_own_columns_and_roles():
    row = {"dialogo": [{"chi": "utente", "testo": "a"}]}
    named = source(
        messages_field="dialogo", role_field="chi", content_field="testo", roles={"utente": "user", "bot": "assistant"}
    )
    fmt = choose_format(named, [row])
    assert (fmt.kind, fmt.messages_field, fmt.roles["utente"]) == ("conversation", ("dialogo",), "user")


WRONG = {
    "nothing known": ({}, {"testo": "a"}, r"its format is not recognised \(its columns are testo\); name the columns"),
    "no columns": ({}, {}, r"its columns are none"),
    "typo": ({"format": "messages"}, {"mesages": []}, r"no column `messages` or .*; did you mean "),
    "far off": ({"format": "preference"}, {"x": 1}, r"no column `chosen`.*; name the column"),
    "columns without messages": (
        {"format": "messages"}, SHAREGPT, r"are not of format messages .* they look like format sharegpt: set",
    ),
    "columns of other rows": ({"format": "messages"}, {"messages": "text"}, r"have the columns"),
    "no text": ({"format": "alpaca"}, {"instruction": 1, "output": 2}, r"but not both filled with text"),
    "named column absent": ({"prompt_field": "a", "format": "alpaca"}, {"output": "x"}, r"no column `a`"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "row", "expected"), WRONG.values(), ids=WRONG)
def test_rows_of_another_format(keys, row, expected):
    with pytest.raises(DataError, match=expected):
        choose_format(source(**keys), [row])


def test_columns_that_only_some_rows_have():
    with pytest.raises(DataError, match="have the columns of format messages"):
        choose_format(source(format="messages"), [{"x": 1}, {"messages": "text"}])
    with pytest.raises(DataError, match="not both filled with text"):
        choose_format(source(format="alpaca"), [{"instruction": "a"}, {"output": "b"}])


OWN = "kind: instruction\nprompt_field: [domanda]\nresponse_field: [risposta]\n"


def test_a_mapping_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    assert choose_format(source(format=str(path)), [{"domanda": "a", "risposta": "b"}]).prompt_field == ("domanda",)
    path.write_text(OWN.replace("domanda", "quesito"))  # read again, not remembered
    assert load_format(str(path)).prompt_field == ("quesito",)


BAD = {
    "unknown key": (OWN + "answer_field: [x]\n", r":4: unknown key `answer_field`"),
    "unknown kind": (OWN.replace("instruction", "chat"), r":1: `kind` must be one of"),
    "unknown role": (OWN + "roles: {capo: boss}\n", r":4: "),
    "given twice": (OWN + "kind: preference\n", r":4: `kind` is given twice"),
    "empty": ("", r":1: is not a section of keys"),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_a_wrong_mapping_file_is_told_with_its_line(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load_format(str(path))


def test_an_unknown_format():
    with pytest.raises(RecipeError, match="did you mean `sharegpt`"):
        load_format("shareGPT4")
    with pytest.raises(RecipeError, match="use auto, alpaca, choice, completion, messages, preference, pretok"):
        load_format("zzzz")
