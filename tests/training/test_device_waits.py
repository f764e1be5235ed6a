"""How often the host waits for the device in an optimizer step: once, for the check of loss and gradient norm."""

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from nesso_tune import train
from nesso_tune.model.attention import AttentionSpans
from nesso_tune.model.lm_head import PackedRow
from nesso_tune.training.numerical_checks import SpikeGuard
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.throughput import AttentionCostCollator
from nesso_tune.training.trainer import BaseTrainer
from tests.support.device_waits import count_waits
from tests.support.runs import recipe

TRAIN = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
LOSSES = {"sft": {}, "dpo": {"dpo": {"loss": {"sigmoid": 1.0, "sft": 0.2}}}}


@pytest.fixture
def source(request, method):
    return request.getfixturevalue("talks" if method == "sft" else "pairs")


@pytest.mark.parametrize("method", LOSSES)
def test_a_step_waits_once(tmp_path, source, method):
    with count_waits(step=2) as found:
        train(recipe(method, tmp_path / "run", [source], train=TRAIN, evaluation=None, **LOSSES[method]))
    assert found.micro_batches == 2
    assert found.operations > 500, "the step was watched"
    assert [(name, place.split(":")[0]) for name, place in found.waits.elements()] == [
        ("tolist", "training/numerical_checks.py")
    ]


@pytest.mark.parametrize("method", ["sft"])
def test_a_wait_in_the_loss_is_seen(tmp_path, source, method, monkeypatch):
    original = ConversationTrainer.compute_loss

    def with_waits(self, model, inputs, *arguments, **options):
        loss = original(self, model, inputs, *arguments, **options)
        assert loss.item() > 0
        assert len(inputs["labels"][inputs["labels"] > 0])
        assert loss.detach().cpu().numpy() > 0
        return loss

    monkeypatch.setattr(ConversationTrainer, "compute_loss", with_waits)
    with count_waits(step=2) as found:
        train(recipe(method, tmp_path / "run", [source], train=TRAIN, evaluation=None))
    names = [name for name, _ in found.waits.elements()]
    for name in ("aten::_local_scalar_dense", "aten::index", "cpu", "numpy"):
        assert names.count(name) >= 2, name  # once per micro batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", LOSSES)
def test_no_micro_batch_waits_for_a_gpu(tmp_path, source, method, monkeypatch):
    step = BaseTrainer.training_step

    def without_waits(self, *arguments, **options):
        if self.state.global_step < 1:  # the first step compiles and checks
            return step(self, *arguments, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, *arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(BaseTrainer, "training_step", without_waits)
    train(recipe(method, tmp_path / "run", [source], train=TRAIN, evaluation=None, **LOSSES[method]))


@pytest.mark.parametrize("method", LOSSES)
def test_the_next_batches_are_collated_before_the_step_waits(tmp_path, source, method, monkeypatch):
    events = []
    collate, check = AttentionCostCollator.__call__, SpikeGuard.allows_update
    monkeypatch.setattr(AttentionCostCollator, "__call__", lambda *a: (events.append("collate"), collate(*a))[1])
    monkeypatch.setattr(SpikeGuard, "allows_update", lambda *a: (events.append("update"), check(*a))[1])
    train(recipe(method, tmp_path / "run", [source], train=TRAIN, evaluation=None, **LOSSES[method]))
    updates = [i for i, event in enumerate(events) if event == "update"]
    assert [events[:i].count("collate") for i in updates] == [5, 6, 6], "two per step, one step and one batch ahead"


def test_a_packed_row_can_be_pinned(monkeypatch):
    """What the data loader pins; the copies from pinned memory need a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    row = PackedRow(torch.tensor([[1, 2]]), AttentionSpans.from_pairs([(2, 1, 1)]), torch.tensor([0]))
    pinned = pin_memory({"packed_row": row, "tokens": 3})["packed_row"]
    assert (pinned.input_ids.tolist(), pinned.logits_to_keep.tolist()) == ([[2, 3]], [1])
    for name in ("cu_seqlens", "position_ids", "gather_indices", "restore_indices"):
        assert torch.equal(getattr(pinned.spans, name), getattr(row.spans, name) + 1)
