"""`status.json` and `nesso-tune status`: what a run says of itself while it trains and after every kind of end."""

import json
import os
import time

import pytest

from nesso_tune.cli.main import main
from nesso_tune.data.privacy import Privacy
from nesso_tune.errors import NumericalError, Preempted
from nesso_tune.files import acquire_lock
from nesso_tune.planning.planner import make_plan
from nesso_tune.runs.run_status import (
    find_runs,
    format_duration,
    read_status,
    recorded_status,
    status_in_words,
    summarize_run,
)
from tests.support.runs import recipe


@pytest.fixture
def plan(tmp_path, talks):
    return make_plan(recipe("sft", tmp_path / "r", [talks], train={"max_steps": 20}))


@pytest.fixture
def privacy(tmp_path, talks):
    return Privacy(recipe("sft", tmp_path / "r", [talks]).data)


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    for name, text in (("manifest.json", "{}"), ("recipe.yaml", "")):
        (run / name).write_text(text)
    lines = [{"step": 5, "loss": 2.5, "seconds": 50.0, "tokens_per_second": 1000.0}, {"step": 6, "event": "answer"}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7')
    return run


def test_a_normal_end_is_recorded(run, plan, privacy):
    with recorded_status(run, plan, privacy):
        status = read_status(run)
        assert (status.state, status.ended, status.process, status.total_steps) == ("training", None, os.getpid(), 20)
        assert status.learning_rates[0][0] == 0
        assert status.learning_rates[-1][0] == 20
    assert status_in_words(run) == "finished at step 6 of 20"


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (Preempted("run", "asked to stop; saved at step 6", "go on"), "stopped", "asked to stop; saved at step 6"),
        (NumericalError("step 6", "loss is nan", "lower the rate"), "failed", "step 6: loss is nan; lower the rate"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
        (RuntimeError("a private text"), "failed", "RuntimeError"),
    ],
)
def test_other_ends_are_recorded_and_raised(run, plan, privacy, error, state, words):
    with pytest.raises(type(error)), recorded_status(run, plan, privacy):
        raise error
    assert read_status(run).state == state
    assert status_in_words(run) == f"{state} at step 6 of 20: {words}"


def test_a_killed_run_has_no_recorded_end(run, plan, privacy):
    context = recorded_status(run, plan, privacy)
    context.__enter__()
    assert status_in_words(run).startswith("no end recorded: the process is gone, last line at step 6 of 20, 20")
    assert summarize_run(run, run.parent).state == "gone"
    with acquire_lock(run / ".lock", "", timeout=0):
        assert status_in_words(run) == "training, step 6 of 20"
        summary = summarize_run(run, run.parent)
    assert summary.cells()[:6] == ("a", "training", "6/20", "2.5000", "1,000", "1 min 57 s")
    assert summary.seconds_since_last_line < time.time()


def test_a_run_that_lost_its_metrics_says_so(run, plan, privacy):
    with recorded_status(run, plan, privacy):
        pass
    (run / "metrics.jsonl").unlink()
    assert status_in_words(run) == "finished at step 0 of 20; metrics.jsonl is missing"


def test_a_run_of_an_earlier_version_has_no_status(run):
    assert status_in_words(run) == "at step 6; its status is not recorded"
    assert summarize_run(run, run).cells()[:3] == (run.name, "unknown", "6")
    (run / "status.json").write_text("{}")
    assert read_status(run) is None


def test_runs_are_found_and_checkpoints_are_not(run):
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "manifest.json").write_text("{}")
    (run / "being-overwritten").mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (run / "being-overwritten" / name).write_text("")
    assert find_runs(run.parent) == find_runs(run) == [run]
    (run / "recipe.yaml").unlink(missing_ok=True)
    assert find_runs(run.parent) == [run], "by its metrics"


def test_the_command_lists_runs(run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["status", str(run.parent)])
    assert end.value.code == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "loss", "tokens/s", "left", "last", "line"]
    assert line.split()[:5] == ["a", "unknown", "6", "2.5000", "1,000"]
    with pytest.raises(SystemExit):
        main(["status", str(run.parent), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["tokens_per_second"] == 1000.0


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["status", str(tmp_path)])
    assert end.value.code == 5
    assert "contains no run directory; name the folder of your runs" in capsys.readouterr().err


def test_durations():
    assert [format_duration(s) for s in (None, 0, 59, 61, 3600, 90_000)] == [
        "", "0 s", "59 s", "1 min 1 s", "1 h", "1 d 1 h"]  # fmt: skip
