"""bfloat16 computes with float32 weights: a run in it follows the run in float32."""

import statistics
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nesso_tune.run import train
from nesso_tune.training.trainer import WeightCasts
from tests.support.runs import BASE, recipe, steps, thorough

DATA = BASE.parent / "data"
WINDOW = 20  # steps that are averaged: single losses are noisy in either


def averaged(run, key="loss"):
    values = list(steps(run, key).values())
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)]


@thorough
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_bfloat16_follows_float32_over_200_steps(tmp_path, method):
    source = DATA / ("conversations.jsonl" if method == "sft" else "pairs.jsonl")
    rates = {"max_steps": 200, "micro_batch_size": 2, "learning_rate": 1e-3 if method == "sft" else 1e-4,
             "schedule": {"warmup_steps": 10}}  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        train(
            recipe(method, tmp_path / dtype, [source], model={"dtype": dtype}, train=rates, evaluation=None,
                   checkpoint={"every_steps": 200}, data={"validation_size": 0, "sequence_len": 64})
        )  # fmt: skip
    whole, half = (averaged(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert whole[-1] < 0.3 * whole[0], "there is something to follow"
    for exact, rounded in zip(whole, half, strict=True):
        assert rounded == pytest.approx(exact, rel=0.05, abs=0.01)
    first = [steps(tmp_path / dtype)[1] for dtype in ("float32", "bfloat16")]
    assert first[1] == pytest.approx(first[0], rel=0.01)


class CastCounter(TorchDispatchMode):
    """Counts casts of matrices from float32 to bfloat16 that are the size of a weight of the quickstart model."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().startswith("aten::_to_copy") and out.dtype == torch.bfloat16 and args[0].is_leaf:
            self.count += args[0].requires_grad and args[0].ndim == 2
        return out


def test_weights_are_cast_once_per_step(tmp_path, talks, monkeypatch):
    counts, weights = {}, {}
    for name in ("kept", "cast again"):
        if name != "kept":
            monkeypatch.setattr(WeightCasts, "kept", lambda *_, **__: nullcontext())
        some = recipe("sft", tmp_path / name, [talks], model={"dtype": "bfloat16"}, evaluation=None,
                      train={"micro_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2})  # fmt: skip
        with CastCounter() as counter:
            train(some)
        counts[name], weights[name] = counter.count, (tmp_path / name / "final" / "model.safetensors").read_bytes()
    assert weights["kept"] == weights["cast again"]
    assert 0 < counts["kept"] <= counts["cast again"] / 3, counts
    assert torch.autocast_increment_nesting() == 1, "no context is left open"
    torch.autocast_decrement_nesting()
