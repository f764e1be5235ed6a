"""Every script and notebook of `examples/` runs in an empty folder, with few steps."""

import json
import runpy
import subprocess
import sys

import pytest

from nesso_tune import load_recipe
from tests.support.runs import ROOT, main_here, metrics

EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, with two steps; returns its output folder and what it printed to stdout."""
    monkeypatch.chdir(tmp_path)

    def run(name, output, *arguments, steps=2):
        monkeypatch.setattr(sys, "argv", [name, "--steps", str(steps), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        folder = tmp_path / "outputs" / "examples" / output
        assert (folder / "final" / "model.safetensors").is_file()
        return folder, capsys.readouterr().out

    return run


def test_edit_and_train(run_example):
    folder, printed = run_example("edit_and_train.py", "edited")
    assert printed.startswith("2 steps on ")
    assert "⟦" in printed, "the preview marks supervised tokens"
    assert "eval_loss/it" in printed
    assert "> What is the capital of Italy?" in printed
    assert load_recipe(folder / "recipe.yaml").train.learning_rate == 2e-3


def test_custom_reader(run_example):
    folder, printed = run_example("custom_reader.py", "tickets")
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    tickets = report["sources"][-1]
    assert (tickets["rows"], tickets["dropped"]) == (10, {"left_out_by_reader": 2}), "two tickets are open"
    assert tickets["unread_texts"] == {}
    assert "510 of 512 rows kept; dropped: {'left_out_by_reader': 2}" in printed


def test_custom_metric(run_example):
    folder, printed = run_example("custom_metric.py", "metric")
    evaluations = [line for line in metrics(folder) if "eval_loss" in line]
    assert len(evaluations) == 2
    assert all(line["words"] > 0 and 0 <= line["one_sentence/it"] <= 1 for line in evaluations)
    assert "words" in printed
    assert load_recipe(folder / "recipe.yaml").train.best_metric == "one_sentence"


def test_callback_and_dataset(run_example):
    folder, _ = run_example("callback_and_dataset.py", "capitals", "--loss", "100")
    assert max(line["step"] for line in metrics(folder) if "step" in line) == 1, "the callback ended the run"


def test_evaluate_and_export(run_example, monkeypatch, capsys):
    start_process = subprocess.run

    def run(command, **options):
        """The command of nesso-tune in this process, without the comparison of answers, which has tests of its own."""
        if command[1:3] != ["-m", "nesso_tune"]:
            return start_process(command, **options)
        code, _, _ = main_here(capsys, *command[3:], "--unchecked")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(subprocess, "run", run)
    folder, _ = run_example("evaluate_and_export.py", "exported", "--limit", "1")
    config = json.loads((folder / "export" / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_notebook(tmp_path, monkeypatch, capsys):
    """The code cells in order, in one namespace; `steps` of the cell of parameters is replaced."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "edit_and_train.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"]] == [], "is committed without outputs"
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["steps"] = 2
    assert "did you mean `train.learning_rate`?" in capsys.readouterr().out
    assert names["recipe"].train.max_steps == max(names["evaluations"].index) == 2
    assert {curve.name for curve in names["figure"].data} >= {"loss", "eval_loss/it", "eval_loss/en"}
    assert len(names["answers"]) == 2
