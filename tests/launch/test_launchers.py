"""One recipe, the same losses, however it is started."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, recipe, steps, write_recipe

PYTHON = [sys.executable, "-m"]
ACCELERATE = [*PYTHON, "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
TORCHRUN = [*PYTHON, "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def ways(processes, path):
    """All ways to start a recipe on some processes of this machine."""
    several = ["--multi_gpu"] if processes > 1 else []
    found = {
        "launch": [*PYTHON, "nesso_tune", "launch", path, "--gpus-per-node", str(processes)],
        "accelerate": [*ACCELERATE, *several, "--num_processes", str(processes), "-m", "nesso_tune", "train", path],
        "torchrun": [*TORCHRUN, f"--nproc_per_node={processes}", "-m", "nesso_tune", "train", path],
    }
    return found | ({"train": [*PYTHON, "nesso_tune", "train", path]} if processes == 1 else {})


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_way_to_start_gives_the_same_losses(tmp_path, talks, processes):
    batch = {"max_steps": 3, "micro_batch_size": 1, "global_batch_size": 4}
    losses = {}
    for name in ways(processes, ""):
        some = recipe("sft", tmp_path / name, [talks], train=batch, distributed={"fsdp": "none"}, evaluation=None)
        command = ways(processes, write_recipe(tmp_path / f"{name}.yaml", some))[name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count(": model in") == 1, "one voice"
        losses[name] = steps(tmp_path / name)
    first = losses.pop("launch")
    assert len(first) == 3
    for name, other in losses.items():
        assert other == first, name


def test_launch_passes_the_exit_code_on(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], distributed={"fsdp": "full_shard"}, train={"micro_batch_size": 1})
    command = ways(2, write_recipe(tmp_path / "r.yaml", some))["launch"]
    done = run(command)
    assert done.returncode == 5
    assert "full_shard was asked for" in done.stderr
