"""What is measured on answers: each figure to the digit, and mistakes that each must show."""

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune import prepare_data
from nesso_tune.generation.answers import (
    Answer,
    Prompt,
    answer_metrics,
    detected_language,
    ends_in_loop,
    is_in_language,
    length_ratios,
    select_prompts,
)
from nesso_tune.run import train
from tests.support.runs import metrics, recipe

ROME = {"it": "La capitale d'Italia è Roma.", "en": "The capital of Italy is Rome."}


def answered(
    text, language="it", *, expected=ROME["it"], rejected="", stopped=True, tokens=(1, 2, 3), source=0, **more
):
    prompt = Prompt([1], [2], [], language, source)
    return Answer(prompt, text, expected, rejected, stopped, tokens, **more)


def test_figures_whole_and_by_language():
    answers = [
        answered(ROME["it"], tokens=range(8), expected_tokens=8),
        answered(ROME["en"], tokens=range(6), expected_tokens=8, stopped=False),
        answered("42", tokens=[5], expected="42", expected_tokens=1),
        answered(ROME["en"], "en", expected=ROME["en"], tokens=[7] * 24, expected_tokens=300, expected_stops=False),
    ]
    found = answer_metrics(answers)
    assert found == {
        "answers": 4, "answers/it": 3, "answers/en": 1,
        "answers_told": 3, "answers_told/it": 2, "answers_told/en": 1,
        "stop_rate": 3 / 4, "stop_rate/it": 2 / 3, "stop_rate/en": 1,
        "expected_stop_rate": 3 / 4, "expected_stop_rate/it": 1, "expected_stop_rate/en": 0,
        "exact_match": 3 / 4, "exact_match/it": 2 / 3, "exact_match/en": 1,
        "language_fidelity": 2 / 3, "language_fidelity/it": 1 / 2, "language_fidelity/en": 1,
        "repetition_rate": 1 / 4, "repetition_rate/it": 0, "repetition_rate/en": 1,
        "answer_tokens": 39 / 4, "answer_tokens/it": 5, "answer_tokens/en": 24,
        "expected_tokens": 317 / 4, "expected_tokens/it": 17 / 3, "expected_tokens/en": 300,
    }  # fmt: skip
    assert answer_metrics(answers, "train_") == {f"train_{name}": value for name, value in found.items()}
    assert answer_metrics([]) == {}


def test_pairs_are_also_compared_with_the_rejected_answer():
    two = [answered(text, rejected="Roma.") for text in (ROME["it"], "Roma!")]
    assert answer_metrics(two)["closer_to_chosen"] == 1 / 2


def test_figures_by_source_where_there_are_several():
    answers = [answered(ROME[code], source=i) for i, code in ((0, "it"), (0, "it"), (1, "en"))]
    found = answer_metrics(answers, sources=("chats.jsonl", "hub/name"))
    assert found["language_fidelity/source/chats.jsonl"] == 1
    assert found["language_fidelity/source/hub/name"] == 0
    assert (found["answers/source/chats.jsonl"], found["answers/source/hub/name"]) == (2, 1)
    alone = answer_metrics(answers[:2], sources=("chats.jsonl",))
    assert not [name for name in alone if "source" in name]


def test_prompts_are_taken_from_languages_and_their_sources_in_turn(sources):
    some = recipe("sft", "unused", sources, data={"validation_size": 0, "packing": False})
    prompts = select_prompts(prepare_data(some).train, 6)
    assert [(prompt.language, prompt.source) for prompt in prompts] == [
        ("en", 0), ("it", 0), ("en", 0), ("it", 1), ("en", 0), ("it", 0)
    ]  # fmt: skip


@pytest.fixture
def sources(write_rows, chats):
    """Two files: one in two languages, one in Italian alone."""
    return [write_rows(chats, "both.jsonl"), write_rows([row for row in chats if row["language"] == "it"], "it.jsonl")]


@pytest.mark.parametrize(
    ("text", "language", "wanted"),
    [
        (ROME["it"], "it", True),
        (ROME["en"], "en", True),
        (ROME["en"], "it", False),
        (ROME["it"], "en", False),
        ("The sky is blue.", "it", False),
        ("Il cielo è azzurro.", "it", True),
        ("La capital de Italia es Roma y es una ciudad muy antigua.", "it", False),
        ("", "it", None),
        ("Rome.", "it", None),
        ("42", "it", None),
        ("3.14 + 2 = 5.14", "it", None),
        ("```python\nprint('the capital of Italy is Rome')\n```", "it", None),
        ("Ecco il programma che hai chiesto:\n```python\nprint('the capital of Italy is Rome')", "it", True),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>', "it", None),
        ("Lo trovi in questa pagina: https://example.org/the/capital/of/italy/is/rome/and/more", "it", True),
        ("意大利的首都是罗马。", "zh", True),
        (ROME["it"], "xx", None),
        (ROME["it"], "zxx", None),
    ],
)
def test_the_language_of_an_answer(text, language, wanted):
    assert is_in_language(text, language, ROME["it"]) is wanted


def test_where_a_row_names_no_language_the_datas_answer_does():
    assert is_in_language(ROME["it"], "und", "Il cielo è azzurro.") is True
    assert is_in_language(ROME["en"], "und", "Il cielo è azzurro.") is False
    assert is_in_language(ROME["en"], "und", "42") is None
    assert detected_language("\ud800 42") == "und"


def test_fidelity_is_absent_where_no_answer_can_be_told():
    found = answer_metrics([answered("42"), answered("")])
    assert "language_fidelity" not in found
    assert found["answers_told"] == 0


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([9] * 24, True),
        ([9] * 23, False),  # 24 tokens at least
        ([1, 2] * 12, True),
        ([*range(100, 150), *[1, 2, 3, 4] * 6], True),
        ([*[1, 2, 3, 4] * 6, 5], False),  # it ends otherwise
        ([*range(8)] * 3, True),
        ([*range(8)] * 2, False),  # three times at least
        ([*range(64)] * 3, True),
        ([*range(65)] * 3, False),  # blocks of 64 at most
        ([*range(20, 30)] * 3 + [20, 21, 22], True),  # the last one is cut
        ([*range(200)], False),
        ([], False),
        ([token for i in range(20) for token in (i + 50, 1, 2, 3, 4, 5, 6)], False),  # a numbered list of like lines
    ],
)
def test_what_a_loop_is(ids, wanted):
    assert ends_in_loop(ids) is wanted


def test_lengths_against_the_parents():
    now = {"answer_tokens": 12.0, "answer_tokens/it": 9.0, "answer_tokens/en": 15.0, "answers": 4}
    parent = {"answer_tokens": 8.0, "answer_tokens/it": 9.0, "answer_tokens/en": 0.0}
    assert length_ratios(now, parent) == {"answer_length_ratio": 1.5, "answer_length_ratio/it": 1.0}
    mine = {f"train_{name}": value for name, value in now.items()}
    assert length_ratios(mine, parent, "train_") == {
        "train_answer_length_ratio": 1.5,
        "train_answer_length_ratio/it": 1.0,
    }
    assert length_ratios(now, {}) == {}


def learned(folder, write_rows, rows, asked, **data):
    """The last evaluation of a tiny model that has learned some rows by heart, asked others."""
    files = [write_rows(some, f"{folder.name}-{i}.jsonl") for i, some in enumerate((rows * 4, asked))]
    evaluation = {"every_steps": 40, "samples": 8, "max_new_tokens": 24}
    some = recipe("sft", folder, files[:1], data={"validation_sources": [{"path": files[1]}], "validation_size": 0.01,
                  **data}, train={"max_steps": 40, "micro_batch_size": 4, "learning_rate": 3e-3},
                  checkpoint={"every_steps": 40}, evaluation=evaluation)  # fmt: skip
    train(some)
    (line,) = [line for line in metrics(folder) if "eval_loss" in line]
    return line


def test_a_model_that_only_knows_english_and_one_that_cannot_stop_are_seen(tmp_path, write_rows, chats):
    """The same rows, learned as they should be, in one language alone, and without their end tokens."""
    rows = [row for row in chats if "Leonardo" not in str(row)]
    whole = learned(tmp_path / "whole", write_rows, rows, rows)
    assert {whole[f"{name}{part}"] for name in ("stop_rate", "language_fidelity", "exact_match")
            for part in ("", "/it", "/en")} == {1.0}  # fmt: skip
    assert whole["repetition_rate"] == 0
    assert whole["answer_tokens"] == whole["expected_tokens"]
    english = learned(tmp_path / "english", write_rows, [row for row in rows if row["language"] == "en"], rows)
    assert english["language_fidelity/it"] == 0
    assert english["language_fidelity/en"] == 1
    assert english["stop_rate/it"] == 1, "nothing else shows it"
    endless = learned(tmp_path / "endless", write_rows, rows, rows, train_on_eos="none")
    assert endless["stop_rate"] == 0
    assert endless["expected_stop_rate"] == 1
    assert endless["answer_tokens"] == 24
    assert endless["language_fidelity"] == 1, "nothing else shows it"


def test_asking_changes_nothing_of_the_training(tmp_path, pairs):
    asked = train(recipe("dpo", tmp_path / "asked", [pairs], evaluation={"every_steps": 1}))
    silent = train(recipe("dpo", tmp_path / "silent", [pairs], evaluation=None))
    a, b = (load_file(result.model_dir / "model.safetensors") for result in (asked, silent))
    assert all(torch.equal(a[name], b[name]) for name in a)
    parents = [line for line in metrics(tmp_path / "asked") if line.get("event") == "parent"]
    assert [(line["step"], line["answers"], line["max_new_tokens"]) for line in parents] == [(0, 2, 8)]
    assert not [line for line in metrics(tmp_path / "silent") if line.get("event") == "parent"]
    line = next(line for line in metrics(tmp_path / "asked") if "eval_loss" in line)
    assert line["answer_length_ratio"] == pytest.approx(line["answer_tokens"] / parents[0]["answer_tokens"])
