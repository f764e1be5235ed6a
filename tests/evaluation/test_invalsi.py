"""INVALSI: rows of the public file, the choice by log-likelihood and the choice that an answer names."""

import json
from pathlib import Path

import pytest

from nesso_tune import DataError
from nesso_tune.evaluation.invalsi import chosen_option, parse_row, prompt_of
from nesso_tune.evaluation.prompts import read_prompts
from nesso_tune.evaluation.runner import evaluate
from nesso_tune.evaluation.suites import Task, load_suite, with_data

SHARED = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared").is_dir()), Path("none"))
OPTIONS = ("La volpe", "Il corvo", "Il formaggio")


def row(**change):
    options = [{"scelta": f"{letter}. {text}"} for letter, text in zip("ABC", OPTIONS, strict=True)]
    return {"ID": "1", "Grado": "5", "question": "Chi perde qualcosa?", "options": options, "answer": ["B"],
            "context": float("nan")} | change  # fmt: skip


@pytest.fixture
def school_test(tmp_path):
    """Six questions, with the bare word NaN that pandas writes, and a row with two right answers."""
    rows = [row(ID=str(i), answer=["ABC"[i % 3]], context="Una favola." if i % 2 else float("nan")) for i in range(6)]
    file = tmp_path / "invalsi.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, row(answer=["A", "B"])]))
    assert "NaN" in file.read_text()
    return str(file)


def test_rows():
    question = parse_row(row())
    assert (question.answer, question.options) == (1, OPTIONS)
    assert prompt_of(question) == "Chi perde qualcosa?\n\nA. La volpe\nB. Il corvo\nC. Il formaggio"
    assert parse_row(row(context="Un testo.")).text == "Un testo.\n\nChi perde qualcosa?"
    assert parse_row(row(answer=["Il formaggio"])).answer == 2
    assert parse_row(row(answer=["A", "B"])) is None
    assert parse_row(row(answer=["Z"])) is None
    assert parse_row(row(options=None, answer=["libera"])) is None


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1), ("B.", 1), (" (B) Il corvo", 1), ("B: perché lo dice il testo", 1), ("**C**", 2),
        ("La risposta corretta è la B.", 1), ("La risposta è: C", 2), ("L'opzione corretta è \"A\"", 0),
        ("Penso che sia B, perché canta.", 1), ("Il corvo", 1), ("È il formaggio che cade", 2),
        ("A che serve saperlo?", None), ("A o B", None), ("E poi non so", None), ("", None), ("D", None),
        ("La volpe e il corvo", None), ("B\nLa volpe mangia", 1),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(answer, choice):
    assert chosen_option(answer, OPTIONS) == choice


def test_both_ways_run_on_a_model(chat_model, school_test):
    pytest.importorskip("lm_eval")
    suite = with_data(load_suite("invalsi"), {"invalsi": school_test, "invalsi_generation": school_test})
    (result,) = evaluate([str(chat_model)], suite)
    assert len(result.metrics["invalsi/acc"].scores) == 6
    assert len(result.metrics["invalsi_generation/acc"].scores) == 6
    assert 0 <= result.metrics["invalsi_generation/answered"].value <= 1
    assert evaluate([str(chat_model)], suite)[0].computed == ()


def test_the_data_must_be_named(chat_model):
    pytest.importorskip("lm_eval")
    with pytest.raises(DataError, match="task invalsi: needs a data file; name it: --data invalsi=FILE"):
        evaluate([str(chat_model)], load_suite("invalsi"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_the_public_file():
    task = Task(kind="invalsi", task="invalsi", metrics=("acc",), data=str(SHARED / "eval_it_invalsi.jsonl"))
    questions = read_prompts(task, parse_row)
    assert len(questions) == 292
    assert all(question.text and all(question.options) for question in questions)
