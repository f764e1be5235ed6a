"""The language of a row: from its column, from the recipe, or detected in its text."""

import pytest

from nesso_tune import Message, PreferencePair, prepare_data
from nesso_tune.data.languages import detect_example_language, detect_language

TEXTS = {
    "it": "Qual è la capitale d'Italia? La capitale d'Italia è Roma, una città molto antica.",
    "en": "What is the capital of Italy? The capital of Italy is Rome, a very old city.",
    "fr": "Quelle est la capitale de l'Italie ? La capitale de l'Italie est Rome.",
    "zh": "意大利的首都是哪里?意大利的首都是罗马。",
}


@pytest.mark.parametrize(("code", "text"), TEXTS.items())
def test_whole_sentences(code, text):
    assert detect_language(text) == code


@pytest.mark.parametrize("text", ["", " ", "42", "1 + 1 = 2", "http://x.y/z", "{}[];", "😀", "\ud800", "a\x00"])
def test_text_without_language_is_undetermined(text):
    assert detect_language(text) == "und"


def test_system_messages_and_tool_results_do_not_count():
    pair = PreferencePair(
        (Message("system", TEXTS["en"] * 3), Message("user", TEXTS["it"]), Message("tool", TEXTS["en"] * 3)),
        Message("assistant", TEXTS["it"]),
        Message("assistant", TEXTS["en"] * 3),
    )
    assert detect_example_language(pair) == "it"


def test_auto_prefers_the_language_column(sft, write_rows):
    rows = [{"prompt": text, "response": text} for text in TEXTS.values()] * 3
    rows += [{"prompt": TEXTS["it"], "response": TEXTS["it"], "lang": "de"}]
    path = write_rows(rows)
    report = prepare_data(sft({"path": path, "language": "auto"}, validation_size=0)).report
    assert {code: n["rows"] for code, n in report["languages"].items()} == {"it": 3, "en": 3, "fr": 3, "zh": 3, "de": 1}
    report = prepare_data(sft({"path": path}, validation_size=0)).report
    assert {code: n["rows"] for code, n in report["languages"].items()} == {"und": 12, "de": 1}
