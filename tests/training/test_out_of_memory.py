"""Out of GPU memory is an error of the environment that says what was expected, what is in use, and what to lower."""

import pytest
import torch

from nesso_tune.cli import main as cli
from nesso_tune.errors import RunEnvironmentError, exit_code_of, is_out_of_memory
from nesso_tune.planning.hardware import GIB, find_gpu
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.training.evaluator import Evaluator
from nesso_tune.training.out_of_memory import MemoryInUse, out_of_memory
from nesso_tune.training.trainer import BaseTrainer
from tests.support.runs import main_here, recipe, write_recipe

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.14 GiB")

QLORA = {"adapter": {"type": "qlora"}, "dtype": "bfloat16", "random_init": False}


def raise_oom(*_, **__):
    raise OOM


def wrapped():
    """An out-of-memory error as the cause of another one."""
    error = ValueError("while training")
    error.__cause__ = OOM
    return error


@pytest.mark.parametrize(
    "error",
    [
        OOM,
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error, Last error: Cuda failure 2 'out of memory'"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        wrapped(),
    ],
)
def test_what_counts_as_out_of_memory(error):
    assert is_out_of_memory(error)
    assert exit_code_of(error) == 5


def test_what_does_not():
    for error in (RuntimeError("a bug"), ValueError("out of memory"), RunEnvironmentError("memory", "out of", "less")):
        assert not is_out_of_memory(error)
    assert exit_code_of(RuntimeError("a bug")) == 1


def said(some, processes=8, in_use=None):
    plan = make_plan(some, World(processes, find_gpu("a100-80gb")))
    return plan, str(out_of_memory(OOM, some, plan, in_use))


def test_the_message_has_the_plan_the_memory_in_use_and_what_to_lower_in_order(tmp_path, talks):
    batch = {"micro_batch_size": 4, "global_batch_size": 64, "gradient_checkpointing": False}
    some = recipe("sft", tmp_path, [talks], train=batch, distributed={"fsdp": "none"})
    plan, message = said(some, in_use=MemoryInUse(60 * GIB, 62 * GIB, 2 * GIB, 80 * GIB))
    assert f"the plan expected about {plan.memory.total / GIB:.1f} of 80 GiB on each a100-80gb, without" in message
    for part in ("weights and optimizer", "activations", "logits", "gathered weights and CUDA"):
        assert part in message
    assert "60.0 GiB are allocated and 62.0 GiB reserved by torch, 2.0 GiB of 80.0 GiB are free" in message
    assert "16.0 GiB are used by other processes" in message
    order = ["lower train.micro_batch_size (now 4)", "set train.gradient_checkpointing: true",
             "lower data.sequence_len (now 128)", "set distributed.fsdp: full_shard"]  # fmt: skip
    assert sorted(order, key=message.index) == order
    assert message.startswith("rank 0 on ")


def test_only_what_helps_is_named(tmp_path, talks):
    batch = {"micro_batch_size": 1, "global_batch_size": 64, "gradient_checkpointing": True}
    _, message = said(recipe("sft", tmp_path, [talks], train=batch, distributed={"fsdp": "full_shard"}))
    assert "micro_batch_size" not in message
    assert "gradient_checkpointing: true" not in message
    assert "full_shard" not in message
    assert "used by other processes" not in message
    for sections in ({"train": {**batch, "optimizer": "adamw_8bit"}}, {"train": batch, "model": QLORA}):
        _, message = said(recipe("sft", tmp_path, [talks], distributed={"fsdp": "none"}, **sections))
        assert "lower data.sequence_len" in message
        assert "full_shard" not in message, "it cannot be sharded"


@pytest.mark.parametrize("place", ["the first step", "a later step", "evaluation", "generation"])
def test_a_run_exits_with_5_wherever_it_happens(tmp_path, talks, monkeypatch, capsys, place):
    step = BaseTrainer.training_step

    def fails_at_three(self, *arguments, **options):
        return raise_oom() if self.state.global_step == 2 else step(self, *arguments, **options)

    target = {
        "the first step": (BaseTrainer, "training_step", raise_oom),
        "a later step": (BaseTrainer, "training_step", fails_at_three),
        "evaluation": (Evaluator, "__call__", raise_oom),
        "generation": ("nesso_tune.training.evaluator.generate_answers", raise_oom),
    }[place]
    monkeypatch.setattr(*target)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    code, _, err = main_here(capsys, "train", path)
    assert code == 5
    assert "memory: out of memory: CUDA out of memory. the plan expected about " in err
    assert "in this order: lower train.micro_batch_size (now 2)" in err
    assert "internal error" not in err


def test_outside_a_run_it_is_no_internal_error_either(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", raise_oom)
    code, _, err = main_here(capsys, "chat")
    assert code == 5
    assert err.startswith("memory: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "internal error" not in err
