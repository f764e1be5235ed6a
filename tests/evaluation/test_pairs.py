"""Preference pairs from several answers: by a judge, by votes, by checks; DPO reads the file."""

import json

import pytest

from nesso_tune import DataError
from nesso_tune.evaluation.pairs import AnsweredLine, score_by_checks, scores_by_votes, write_pairs
from nesso_tune.run import train
from tests.support.runs import main_here, metrics, recipe

ITALIAN, ENGLISH = "La capitale d'Italia è la città di Roma.", "The capital of Italy is the city of Rome."


def line(*answers, stopped=None):
    turns = [{"role": "user", "content": "Qual è la capitale d'Italia?"}]
    return AnsweredLine(turns, "it", answers, stopped or [True] * len(answers))


def test_checks_of_answers():
    loop = "e poi " * 30
    scored = score_by_checks(line(ITALIAN, ENGLISH, "", loop, ITALIAN, stopped=[True, True, True, True, False]))
    assert list(scored) == [4, 3, 3, 3, 3]


def test_the_best_finished_answer_is_chosen_and_the_worst_rejected(tmp_path):
    lines = [line("a", "b", "c"), line("a", "b"), line("a", "a"), line("a", "b", stopped=[False, True]), line("", "b")]
    scores = [[2, 5, 1], [3, 3], [1, 4], [5, 3], [5, None]]
    file = tmp_path / "pairs.jsonl"
    assert write_pairs(file, lines, scores) == 1
    (pair,) = map(json.loads, file.read_text().splitlines())
    assert (pair["chosen"], pair["rejected"], pair["language"]) == ("b", "c", "it")
    with pytest.raises(DataError, match="no prompt has two answers with different scores"):
        write_pairs(file, lines[1:], scores[1:])


def test_votes(write_rows, tmp_path):
    from pathlib import Path

    lines = [line("a", "b", "c"), line("a", "b")]
    votes = [{"line": 1, "chosen": 2, "rejected": 1}, {"line": 1, "chosen": 2, "rejected": 3}]
    assert scores_by_votes(Path(write_rows(votes)), lines) == [[-1, 2, -1], [None, None]]
    for vote in ({"line": 3, "chosen": 1, "rejected": 2}, {"line": 1, "chosen": 4, "rejected": 2}, {"line": 1}):
        with pytest.raises(DataError, match=r"rows.jsonl:1: is no vote"):
            scores_by_votes(Path(write_rows([vote])), lines)


@pytest.fixture
def call(chat_model, write_rows, tmp_path, capsys):
    prompts = write_rows([{"prompt": f"Quanto fa {i} più uno?", "language": "it"} for i in range(6)], "prompts.jsonl")

    def generate(*options):
        return main_here(capsys, "generate", chat_model, "--prompts", prompts, "--n", "3", "--max-new-tokens", "6",
                         "-o", tmp_path / "a.jsonl", *options)  # fmt: skip

    return generate


def test_pairs_of_a_judge_train_dpo(call, chat_model, endpoint, tmp_path, monkeypatch):
    """The stub judge gives more points to one answer to each prompt; an interrupted call is continued."""
    url, stub = endpoint
    assert call()[0] == 0
    rows = [json.loads(text) for text in (tmp_path / "a.jsonl").read_text().splitlines()]
    for row in rows:  # a model of one step neither ends its answers nor knows the capital
        row["answers"] = [{"text": text, "stopped": True} for text in ("Roma", "Milano", "Torino")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--pairs", "judge", "--judge", url, "--judge-model", "stub")
    code, out, err = call(*options)
    assert code == 0, err
    assert "a-pairs.jsonl: 6 pairs of 6 prompts, rated by judge" in out
    whole, asked = (tmp_path / "a-pairs.jsonl").read_bytes(), stub.requests
    assert asked == 18
    scores = (tmp_path / "a-scores.jsonl").read_bytes()
    (tmp_path / "a-scores.jsonl").write_bytes(scores[: len(scores) * 2 // 3 + 3])
    (tmp_path / "a-pairs.jsonl").unlink()
    code, _, err = call(*options)
    assert code == 0
    assert "continues after 4 of 6 prompts" in err
    assert stub.requests == asked + 6
    assert (tmp_path / "a-pairs.jsonl").read_bytes() == whole
    assert (tmp_path / "a-scores.jsonl").read_bytes() == scores
    code, _, err = call("--pairs", "judge", "--judge", url, "--judge-model", "other")
    assert code == 5
    assert "a-scores.jsonl:1: has scores of other answers or of another judge" in err

    dpo = recipe(
        "dpo", tmp_path / "dpo", [tmp_path / "a-pairs.jsonl"], model={"base": str(chat_model), "random_init": False},
        data={"validation_size": 0}, train={"max_steps": 6}, evaluation=None,
    )  # fmt: skip
    train(dpo)
    accuracies = [row["rewards/accuracies"] for row in metrics(tmp_path / "dpo") if "rewards/accuracies" in row]
    assert accuracies[-1] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--pairs", "judge"), "--pairs judge: needs --judge"),
        (("--pairs", "votes"), "--pairs votes: needs --votes"),
        (("--votes", "v.jsonl"), "--votes: has no effect without --pairs votes"),
        (("--judge", "http://localhost:1/v1"), "--judge: has no effect without --pairs judge"),
        (("--pairs", "metric", "--n", "1"), "--pairs: needs at least two answers"),
    ],
)
def test_options_without_effect_are_errors(call, options, says):
    code, _, err = call(*options)
    assert code == 2
    assert says in err
