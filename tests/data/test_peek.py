"""What the first rows of a source say before anything long begins."""

import pytest

from nesso_tune import DataError
from nesso_tune.data.peek import reading_of
from nesso_tune.recipes.data import Source

SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "w"}, {"from": "human", "value": "e"}]
PAIR = {"conversations": SAID, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
TEXTS = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
WRONG = {
    "pairs, detected": ({}, PAIR, "sft", "holds preference pairs, but SFT learns from conversations; use method: dpo"),
    "the dialogue of pairs": ({"format": "sharegpt"}, PAIR, "sft", "holds preference pairs"),
    "pairs as messages": ({"format": "messages"}, PAIR, "sft", "they look like format preference .preference pairs"),
    "pairs as alpaca": ({"format": "alpaca"}, TEXTS, "sft", "they look like format preference"),
    "chats for dpo": ({}, CHAT, "dpo", "holds conversations, but DPO needs a chosen and a rejected answer"),
    "chats as pairs": ({"format": "preference"}, CHAT, "dpo", "they look like format messages: set format: messages"),
    "columns with other names": (
        {}, {"domanda": "q", "risposta": "a"}, "sft",
        "name its columns, it seems format: alpaca, prompt_field: domanda, response_field: risposta",
    ),
    "nothing known": ({}, {"a": [{"x": 1}], "b": 2}, "sft", r"its columns are a \(a list of objects with x\), b"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "row", "method", "says"), WRONG.values(), ids=WRONG)
def test_rows_of_another_kind(write_rows, keys, row, method, says):
    with pytest.raises(DataError, match=says):
        reading_of(Source(path=write_rows([row] * 3), **keys), method)


ON_PURPOSE = {
    "the chosen answers alone": ({"format": "alpaca", "response_field": "chosen"}, TEXTS),
    "the dialogue alone": ({"format": "sharegpt", "messages_field": "conversations"}, PAIR),
}


@pytest.mark.parametrize(("keys", "row"), ON_PURPOSE.values(), ids=ON_PURPOSE)
def test_columns_named_on_purpose(write_rows, keys, row):
    reading = reading_of(Source(path=write_rows([row] * 3), **keys), "sft")
    assert reading.fmt.kind != "preference"
