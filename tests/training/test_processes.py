"""Two processes give what one gives: FSDP2 on gloo, the same rows in the same steps, files that either reads."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.run import train
from tests.support.runs import ROOT, recipe, steps, write_recipe


def two(*arguments, module="tests.support.fsdp_on_cpu"):
    """Runs the command line on two CPU processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("fsdp", ["full_shard", "none"])
def test_two_processes_equal_one(tmp_path, request, method, fsdp):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    runs = []
    for name, micro in (("one", 4), ("two", 2)):
        batch = {"micro_batch_size": micro, "global_batch_size": 8, "gradient_accumulation_steps": None}
        sections = {"distributed": {"fsdp": fsdp}, "data": {"validation_size": 3}, "train": batch}
        some = recipe(method, tmp_path / name, [source], **sections)
        if name == "one":
            train(some)
        else:
            done = two("train", write_recipe(tmp_path / "two.yaml", some))
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
