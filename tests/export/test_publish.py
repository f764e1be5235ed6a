"""The gate of a recipe: a refused model stays in candidate/, and is refused again until gate or model change."""

import json
import shutil

import pytest

from nesso_tune.evaluation.records import read_records
from nesso_tune.export.weights import FinishedRun
from nesso_tune.run import train
from tests.support.runs import main_here, metrics, recipe, several, sums, thorough, write_recipe

PASSES, REFUSES = 1.0, 0.1  # tolerated drop of the share of answers that end in time; the harmful model drops by 1
LEARNING = {"max_steps": 30, "learning_rate": 3e-3}


def rows_with(answer, folder):
    """Twelve questions with the same answer."""
    rows = [{"prompt": f"Quanto fa {i} + 1?", "response": answer, "lang": "it"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run that learned to give a short answer, without a gate."""
    folder = tmp_path_factory.mktemp("parent")
    some = recipe("sft", folder / "run", [rows_with("No.", folder)], data={"validation_size": 0}, train=LEARNING,
                  checkpoint={"every_steps": 30}, evaluation=None)  # fmt: skip
    train(some)
    return folder / "run"


@pytest.fixture
def gate_file(write_rows, tmp_path):
    """Writes a gate on the share of answers that end within four tokens, which is quick to measure."""
    prompts = write_rows([{"prompt": f"Quanto fa {i} + 1?", "language": "it"} for i in range(12)], "prompts.jsonl")
    task = f"{{kind: chat, task: chat, metrics: [stop_rate], max_new_tokens: 4, data: {prompts}}}"
    (tmp_path / "brief.yaml").write_text(f"title: brief\ntasks: [{task}]\n")

    def write(max_drop):
        metrics = f"chat/stop_rate: {{max_drop: {max_drop}}}"
        text = f"title: ends\nsuites: [{tmp_path / 'brief.yaml'}]\nmetrics:\n  {metrics}\n"
        (tmp_path / "gate.yaml").write_text(text)
        return str(tmp_path / "gate.yaml")

    return write


@pytest.fixture
def gated(parent, tmp_path, gate_file):
    """A recipe that trains the parent on long answers until it gives no others."""
    rows = rows_with("uno due tre quattro cinque sei sette otto nove dieci", tmp_path)
    return lambda max_drop: recipe(
        "sft", tmp_path / "run", [rows], model={"base": str(parent / "final"), "random_init": False},
        data={"validation_size": 0}, train=LEARNING, checkpoint={"every_steps": 30},
        evaluation={"every_steps": 30, "samples": 0, "gate": gate_file(max_drop)},
    )  # fmt: skip


def test_a_harmful_run_is_not_published_until_the_gate_accepts_it(gated, tmp_path, capsys):
    run = tmp_path / "run"
    file = write_recipe(tmp_path / "r.yaml", gated(REFUSES))
    code, _, err = main_here(capsys, "train", file, "--verify", "all")
    assert code == 7, err
    assert "candidate/ verified: loss of" in err
    assert "final/ verified" not in err
    assert "chat/stop_rate is 0.000, and 1.000 in" in err
    assert f"the weights are in {run / 'candidate'}" in err
    assert not (run / "final").exists()
    assert (run / "candidate" / "model.safetensors").is_file()
    assert "Gate `gate` (ends) against" in (run / "candidate" / "README.md").read_text()
    report = (run / "report.html").read_text()
    assert "refused at step 30 of 30" in report
    assert "Gate gate: refused" in report
    (gate,) = read_records(run / "candidate").gates
    assert not gate.passed

    lines = len([line for line in metrics(run) if "loss" in line])
    code, _, err = main_here(capsys, "train", file)
    assert code == 7, "not finished"
    assert "resuming an unfinished run from checkpoint-30" in err
    assert "evaluating" not in err, "its results are in the cache"
    assert len([line for line in metrics(run) if "loss" in line]) == lines, "nothing was trained"

    weights = (run / "candidate" / "model.safetensors").read_bytes()
    code, _, err = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", gated(PASSES)))
    assert code == 0, err
    assert (run / "final" / "model.safetensors").read_bytes() == weights
    assert not (run / "candidate").exists()
    assert "Gate gate: passed" in (run / "report.html").read_text()
    code, _, err = main_here(capsys, "train", file)
    assert code == 0
    assert "this run is finished" in err


@thorough
def test_two_processes_refuse_together(gated, tmp_path):
    done = several("train", write_recipe(tmp_path / "r.yaml", gated(REFUSES)))
    assert done.returncode != 0, "the launcher replaces the exit code"
    assert done.stderr.count("chat/stop_rate is 0.000") == 1
    assert (tmp_path / "run" / "candidate" / "evaluations" / "gate.gate.json").is_file()
    assert "refused at step 30" in (tmp_path / "run" / "report.html").read_text()


def test_a_base_without_a_chat_template_is_compared_with_the_template_of_the_run(whole_base, gate_file, tmp_path):
    """And random weights with nothing."""
    base = {"base": whole_base, "random_init": False}
    rows, off = sums(tmp_path), {"every_steps": 1, "samples": 0, "gate": gate_file(PASSES)}
    made = recipe("sft", tmp_path / "a", [rows], model=base, train={"max_steps": 1}, evaluation=off)
    assert (train(made).model_dir / "evaluations" / "brief.suite.json").is_file()
    assert not (tmp_path / "a" / "parent").exists()
    made = recipe("sft", tmp_path / "b", [rows], train={"max_steps": 1}, evaluation=off)
    assert not (train(made).model_dir / "evaluations").exists()


def test_a_faulty_gate_is_an_error_before_training(gated, tmp_path, capsys):
    file = write_recipe(tmp_path / "r.yaml", gated(PASSES))
    (tmp_path / "prompts.jsonl").unlink()
    code, _, err = main_here(capsys, "train", file)
    assert code == 3
    assert "the data of task chat: no such file" in err
    assert not (tmp_path / "run").exists()
    code, _, err = main_here(capsys, "train", file, "--set", "evaluation.gate=defalt")
    assert code == 2
    assert "did you mean `default`?" in err


def test_results_of_eval_are_in_the_card_and_the_report(parent, gate_file, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(parent, run)
    gate_file(PASSES)
    code, _, err = main_here(capsys, "eval", run, "--suite", tmp_path / "brief.yaml")
    assert code == 0, err
    card, report = ((run / name).read_text() for name in ("final/README.md", "report.html"))
    assert "brief (suite `brief`):" in card
    assert "| chat stop_rate | 1.0000 ± 0.0000 |" in card
    assert "Evaluation: brief" in report
    assert FinishedRun.open(run).path == run, "a renewed card is no damage"

    (run / "final" / "README.md").write_text("# Mine")
    assert main_here(capsys, "eval", run, "--suite", tmp_path / "brief.yaml")[0] == 0
    assert (run / "final" / "README.md").read_text() == "# Mine", "an edited card is kept"
    for file in (run / "final" / "evaluations").iterdir():
        file.write_text("{")
    assert not read_records(run / "final")
