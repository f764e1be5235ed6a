"""Several processes give what one gives: FSDP2 on gloo, the same rows in the same steps, files that either reads."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune import RecipeError, load_recipe
from nesso_tune.run import train
from tests.support.runs import ROOT, metrics, recipe, steps, write_recipe


def two(*arguments, module="tests.support.fsdp_on_cpu", processes=2, **variables):
    """Runs the command line on two CPU processes, or on another number of them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0", "-m", module]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **fixed, **variables}
    return subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


@pytest.mark.parametrize(
    ("method", "fsdp", "processes", "micro"),
    [("sft", "full_shard", 2, 2), ("sft", "none", 2, 2), ("dpo", "full_shard", 2, 2), ("dpo", "none", 2, 2),
     ("sft", "full_shard", 4, 1), ("dpo", "full_shard", 4, 2)],
)  # fmt: skip
def test_several_processes_equal_one(tmp_path, request, method, fsdp, processes, micro):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    runs = []
    for name, rows in (("one", 4), ("several", micro)):
        batch = {"micro_batch_size": rows, "global_batch_size": 8, "gradient_accumulation_steps": None}
        sections = {"distributed": {"fsdp": fsdp}, "data": {"validation_size": 3}, "train": batch}
        some = recipe(method, tmp_path / name, [source], **sections)
        if name == "one":
            train(some)
        else:
            done = two("train", write_recipe(tmp_path / "several.yaml", some), processes=processes)
            assert done.returncode == 0, done.stderr[-3000:]
        runs.append(tmp_path / name)
    one, both = runs
    for key in ("loss", "loss/it", "eval_loss", "eval_loss/en", "tokens", "supervised_tokens"):
        assert steps(both, key) == pytest.approx(steps(one, key), abs=1e-5), key
    a, b = (load_file(run / "final" / "model.safetensors") for run in runs)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-4)
    assert set(load_file(both / "checkpoint-4" / "model.safetensors")) == set(a), "canonical names"


def test_full_shard_that_would_quietly_be_something_else_stops(tmp_path, talks):
    """Without the promotion accelerate falls back to DDP on CPU: the run must not go on as if nothing were."""
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    some = recipe("sft", tmp_path / "run", [talks], distributed={"fsdp": "full_shard"}, train=batch)
    done = two("train", write_recipe(tmp_path / "some.yaml", some), module="nesso_tune")
    assert done.returncode != 0
    assert "full_shard was asked for" in done.stderr


def rows_read(file):
    return [int(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_goes_on_at_another_number_of_processes(tmp_path, request, method, first, second):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "gradient_accumulation_steps": None}
    sections = {"train": {**batch, "max_steps": 6}, "checkpoint": {"every_steps": 3}, "evaluation": {"every_steps": 2}}
    whole = recipe(method, tmp_path / "whole", [source], **sections)
    train(whole)
    path = write_recipe(tmp_path / "r.yaml", recipe(method, tmp_path / "run", [source], **sections))
    logs = [tmp_path / name for name in ("first", "second")]
    for log, processes in zip(logs, (first, second), strict=True):
        done = two("train", path, module="tests.support.recording", processes=processes, ROWS_READ=str(log))
        assert done.returncode == 0, done.stderr[-3000:]
        if log == logs[0]:  # as if it had been killed after step 3
            shutil.rmtree(tmp_path / "run" / "final")
            shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert sorted(rows_read(logs[0])) == list(range(24)), "each row of the run once"
    assert sorted(rows_read(logs[1])) == list(range(12, 24)), "none twice, none left out"
    resumed = next(line for line in metrics(tmp_path / "run") if line.get("event") == "resumed")
    assert resumed["processes"] == [first, second]
    for key in ("loss", "loss/it", "eval_loss", "tokens", "supervised_tokens", "learning_rate"):
        assert steps(tmp_path / "run", key) == pytest.approx(steps(tmp_path / "whole", key), abs=1e-5), key


def test_another_global_batch_is_refused(tmp_path, talks):
    batch = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    some = recipe("sft", tmp_path / "run", [talks], train={**batch, "max_steps": 4})
    path = write_recipe(tmp_path / "r.yaml", some)
    assert two("train", path).returncode == 0
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(RecipeError, match=r"the global batch changed \(4 -> 2\)"):
        train(load_recipe(path))
