"""One recipe, the same losses, however it is started."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, recipe, steps, thorough, write_recipe

PYTHON = [sys.executable, "-m"]
ACCELERATE = [*PYTHON, "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
TORCHRUN = [*PYTHON, "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def ways(processes, path):
    """All ways to start a recipe on some processes of this machine."""
    several = ["--multi_gpu"] if processes > 1 else []
    train = ["-m", "nesso_tune", "train", path, "--verify", "none"]  # to verify takes another interpreter
    found = {
        "launch": [*PYTHON, "nesso_tune", "launch", path, "--gpus-per-node", str(processes), "--verify", "none"],
        "accelerate": [*ACCELERATE, *several, "--num_processes", str(processes), *train],
    }
    if processes == 1:
        return found | {"train": [sys.executable, *train]}
    return found | {"torchrun": [*TORCHRUN, f"--nproc_per_node={processes}", *train]}


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)


@thorough
@pytest.mark.parametrize("processes", [1, 2])
def test_every_way_to_start_gives_the_same_losses(tmp_path, talks, processes):
    batch = {"max_steps": 3, "micro_batch_size": 1, "global_batch_size": 4}
    losses = {}
    for name in ways(processes, ""):
        some = recipe("sft", tmp_path / name, [talks], train=batch, distributed={"fsdp": "none"}, evaluation=None)
        command = ways(processes, write_recipe(tmp_path / f"{name}.yaml", some))[name]
        done = run(command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("model in ") == 1, "one voice"
        losses[name] = steps(tmp_path / name)
    first = losses.pop("launch")
    assert len(first) == 3
    for name, other in losses.items():
        assert other == first, name


def test_launch_trains_and_passes_the_exit_code_on(tmp_path, talks):
    """SFT on two processes, and then a recipe that needs sharded weights, which two CPU processes do not have."""
    batch = {"max_steps": 3, "micro_batch_size": 1, "global_batch_size": 4}
    paths = []
    for name, fsdp in (("sft", "none"), ("sharded", "full_shard")):
        some = recipe("sft", tmp_path / name, [talks], train=batch, distributed={"fsdp": fsdp}, evaluation=None)
        paths.append(write_recipe(tmp_path / f"{name}.yaml", some))
    done = run([*PYTHON, "nesso_tune", "launch", *paths, "--gpus-per-node", "2", "--verify", "none"])
    assert done.returncode == 5
    assert done.stderr.count("model in ") == 1, "one voice"
    assert len(steps(tmp_path / "sft")) == 3
    assert "full_shard is set, but the weights are not sharded" in done.stderr


CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: {version}
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  {sharding}
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
main_process_port: 0
"""


@pytest.mark.parametrize(
    ("version", "sharding", "says"),
    [(1, "fsdp_sharding_strategy: FULL_SHARD", "fsdp_version: 1"),
     (2, "fsdp_reshard_after_forward: false", "fsdp_reshard_after_forward: false"),
     (2, "fsdp_reshard_after_forward: true", None)],
)  # fmt: skip
@thorough
def test_a_configuration_of_accelerates_own(tmp_path, talks, version, sharding, says):
    """What `accelerate config` writes: held against the recipe; where it says the same, the run goes on."""
    batch = {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 2}
    some = recipe("sft", tmp_path / "run", [talks], train=batch, evaluation=None, distributed={"fsdp": "full_shard"})
    path = write_recipe(tmp_path / "r.yaml", some)
    (file := tmp_path / "accelerate.yaml").write_text(CONFIG.format(version=version, sharding=sharding))
    done = run([*PYTHON, "accelerate.commands.launch", "--config_file", str(file), "-m", "tests.support.fsdp_on_cpu",
                "train", path])  # fmt: skip
    if says is None:
        assert done.returncode == 0, done.stderr[-3000:]
        return
    assert done.returncode != 0
    assert f"accelerate's configuration: sets {says}, the recipe distributed.fsdp: " in done.stderr
    assert done.stderr.count("make the two equal, or remove it from the configuration") == 1
