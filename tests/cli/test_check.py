"""`nesso-tune check` as a user meets it."""

import json
import os
import subprocess
import sys

import pytest

from nesso_tune.cli.main import main
from nesso_tune.launch import command as launch_command

TEXT = """\
method: sft
output_dir: {run}
model: {{base: {base}}}
data: {{sequence_len: 256, validation_size: 2, sources: [{{path: {rows}}}]}}
train: {{num_epochs: 4, learning_rate: 1.0e-3, schedule: {{constant_ratio: 0.5, min_ratio: 0.2, warmup_steps: 1}}}}
"""


@pytest.fixture
def recipe(whole_base, chats, write_rows, tmp_path):
    """A recipe file over ten conversations."""
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.format(run=tmp_path / "run", base=whole_base, rows=write_rows(chats)))
    return str(path)


@pytest.fixture
def check(capsys):
    """Runs `check`; returns exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["check", *arguments])
        return end.value.code or 0, *capsys.readouterr()

    return run


def lines_of(out):
    return {line[:15].strip(): line[15:] for line in out.splitlines() if line[:15].strip()}


def test_the_plan_is_printed(check, recipe, tmp_path):
    code, out, err = check(recipe, "--set", "data.packing=false")
    lines = lines_of(out)
    assert (code, err) == (0, "")
    assert out.startswith(f"{recipe}: valid\n")
    assert lines["global batch"] == "1 x 1 accumulation x 1 process(es) = 1 rows of 256 tokens"
    assert lines["data"].startswith("~8 conversations per epoch")
    assert lines["data"].endswith("~2 conversations held out")
    assert lines["steps"].startswith("~32 (~4 epochs); log every 10, save every 8, evaluate every 4")
    assert lines["learning rate"] == "warm-up over 1 steps to 0.001, cosine to step 16, then constant 0.0002 to step 32"
    assert "step 0" in out
    assert "█" in out
    assert not (tmp_path / "run").exists()


def test_json_is_the_plan(check, recipe):
    sets = ["--set", "train.global_batch_size=16", "--set", "train.num_epochs=100"]
    code, out, _ = check(recipe, "--json", "--nodes", "2", "--gpus-per-node", "4", *sets)
    plan = json.loads(out)
    assert code == 0
    assert (plan["processes"], plan["accumulation"], plan["global_batch"]) == (8, 2, 16)
    assert plan["learning_rate"] == 1e-3
    assert plan["volume"]["exact"] is False
    assert plan["schedule"]["min_ratio"] == 0.2
    assert plan["schedule_in_words"].endswith(f"to step {plan['total_steps']}")


def test_several_recipes_are_checked_together(check, recipe, tmp_path):
    other = tmp_path / "other.yaml"
    with open(recipe) as text:
        other.write_text(text.read().replace(str(tmp_path / "run"), str(tmp_path / "other")))
    sets = ["--set", "other:train.num_epochs=8"]
    code, out, err = check(recipe, str(other), *sets)
    assert (code, err) == (0, "")
    mine, _, others = out.partition(f"{other}: valid\n")
    assert mine.startswith(f"{recipe}: valid\n")
    assert [lines_of(part)["steps"].split()[0] for part in (mine, others)] == ["~4", "~8"]
    plans = json.loads(check(recipe, str(other), *sets, "--json")[1])
    assert [plan["total_steps"] for plan in plans] == [4, 8]
    code, _, err = check(recipe, recipe)
    assert code == 2
    assert "has the same output_dir" in err


def test_settings_change_the_plan(check, recipe):
    sets = [word for key in ("train.num_epochs=null", "mine:train.max_steps=7") for word in ("--set", key)]
    code, out, _ = check(recipe, *sets)
    assert code == 0
    assert lines_of(out)["steps"].startswith("~7 ")


def test_shipped_recipes_have_names(check):
    code, out, _ = check("sft", "--nodes", "4", "--gpus-per-node", "8")
    assert code == 0
    assert lines_of(out)["global batch"] == "1 x 8 accumulation x 32 process(es) = 256 rows of 4096 tokens"


def test_all_mistakes_come_in_one_block(check, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "method: sft\noutput_dir: out\nmodel: {bas: b}\ndata: {sources: []}\ntrain:\n  learning_rte: 1e-3\n"
    )
    code, out, err = check(str(path), "--set", "seed=-1")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err.splitlines() == [
        "--set: `seed` must be a number of at least 0, not -1; write a number of at least 0",
        f"{path}:3: `model.base` is missing; add it: hub id or local folder of the base model; for DPO, the `final/` "
        "folder of the SFT run",
        f"{path}:3: unknown key `model.bas`; did you mean `model.base`?",
        f"{path}:4: `data.sources` must not be empty; give it a value: sources of training rows",
        f"{path}:6: unknown key `train.learning_rte`; did you mean `train.learning_rate`?",
    ]


FAULTS = {
    "no file": (["nope.yaml"], 2, "nope.yaml: no such file; check the path"),
    "no shipped recipe": (["sfft"], 2, "did you mean `sft`?"),
    "no value": (["sft", "--set", "seed"], 2, "--set: `seed` has no value; write --set key.path=value"),
    "unknown setting": (
        ["sft", "--set", "train.lr=1"],
        2,
        "--set: unknown key `train.lr`; it is called `train.learning_rate`",
    ),
    "another recipe": (
        ["sft", "--set", "dpo:seed=1"],
        2,
        "`dpo:seed=1` does not name a recipe of this command; use one of sft",
    ),
    "indivisible": (["dpo", "--gpus-per-node", "3"], 2, "set it to 126 or 129"),
    "no data": (["quickstart/sft", "--set", "data.sources.0.path=./nope.jsonl"], 3, "nope.jsonl"),
    "no machines": (["sft", "--nodes", "0"], 2, "--nodes"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), FAULTS.values(), ids=FAULTS)
def test_faults_have_a_line_and_an_exit_code(check, arguments, code, words):
    got, out, err = check(*arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert "internal error" not in err


def test_debug_shows_the_traceback(check):
    code, _, err = check("nope.yaml", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().endswith("nope.yaml: no such file; check the path")


def test_python_m_ends_with_the_same_code_and_words():
    done = subprocess.run(
        [sys.executable, "-m", "nesso_tune", "check", "nope.yaml"], capture_output=True, text=True, env={**os.environ}
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "nope.yaml: no such file; check the path\n")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine whose driver lists four GPUs."""
    for i in range(4):
        (tmp_path / "gpus" / str(i)).mkdir(parents=True)
    monkeypatch.setattr(launch_command, "DRIVER_GPUS", tmp_path / "gpus")


CLUSTER = ("--set", "cluster={nodes: 2, gpus_per_node: 8}")


@pytest.mark.parametrize(
    ("arguments", "processes", "advice"),
    [
        ([], 1, "3 of this machine's 4 GPUs would be idle: `nesso-tune launch` uses all"),
        (["--gpus-per-node", "4"], 4, None),
        (CLUSTER, 16, None),
        ([*CLUSTER, "--gpus-per-node", "4"], 8, "8 of the cluster section's 16 GPUs would be idle"),
    ],
)
def test_idle_gpus_are_told(check, recipe, driver, monkeypatch, arguments, processes, advice):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, out, err = check(recipe, "--set", "train.schedule={}", *arguments)
    assert (code, err) == (0, "")
    assert f"accumulation x {processes} process(es)" in out
    assert ("would be idle" in out) is (advice is not None)
    assert advice is None or f"advice: {advice}\n" in out


def test_hidden_gpus_are_not_idle(check, recipe, driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert "would be idle" not in check(recipe)[1]


@pytest.mark.parametrize(
    ("settings", "processes", "says"),
    [
        ([], 1, "not sharded (single process)"),
        ([], 4, "replicated on 4 processes (DDP); fsdp auto: on CPUs; on GPUs their memory decides"),
        (["distributed.fsdp=full_shard"], 4, "sharded over 4 processes (FSDP2 FULL_SHARD), full checkpoints"),
        (
            ["distributed.state_dict=sharded"],
            4,
            "sharded over 4 processes (FSDP2 FULL_SHARD), sharded checkpoints; "
            "fsdp auto: distributed.state_dict is sharded",
        ),
        (["distributed.fsdp=none"], 4, "replicated on 4 processes (DDP)"),
    ],
)
def test_the_plan_says_how_weights_are_shared(check, recipe, settings, processes, says):
    flags = [word for setting in ["train.schedule={}", *settings] for word in ("--set", setting)]
    assert lines_of(check(recipe, "--gpus-per-node", str(processes), *flags)[1])["weights"] == says
