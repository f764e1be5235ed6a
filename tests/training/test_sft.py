"""The SFT step: loss over the whole global batch, equal however it is split, equal to TRL's, counted by language."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTTrainer
from trl.trainer import base_trainer

from nesso_tune import prepare_data
from nesso_tune.run import train
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.trainer import BaseTrainer
from tests.support.runs import BASE, metrics, recipe, steps


@pytest.fixture
def gradients(monkeypatch):
    """The gradients of every step of the runs of a test, before they are clipped."""
    seen = []
    original = BaseTrainer._clip_grad_norm

    def watched(self, model):
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return original(self, model)

    monkeypatch.setattr(BaseTrainer, "_clip_grad_norm", watched)
    return seen


def test_accumulation_changes_nothing(tmp_path, talks, gradients):
    """8 x 1 = 1 x 8: same rows, same loss, same first gradients, though the rows differ in length."""
    losses = []
    for micro, accumulation in ((8, 1), (1, 8)):
        out = tmp_path / f"{micro}"
        batch = {"max_steps": 3, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        train(recipe("sft", out, [talks], train=batch, data={"packing": False}, evaluation=None))
        losses.append(steps(out))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)
    first = gradients[0::3]
    for other in first[1:]:
        for name, grad in first[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))


def test_loss_and_accuracy_equal_trls_on_the_same_batch(tmp_path, talks, monkeypatch):
    """Fails when TRL's own loss, or what it asks of a model, changes."""
    compared, compute_ours = [], ConversationTrainer.compute_loss

    def both(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        plain = {name: inputs[name] for name in ("input_ids", "labels", "position_ids")}
        theirs = SFTTrainer.compute_loss(self, model, plain, num_items_in_batch=num_items_in_batch)
        ours = compute_ours(self, model, inputs, return_outputs, num_items_in_batch)
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        correct = self._metrics["train"].pop("mean_token_accuracy")[-1] * supervised
        compared.append((float(ours.detach()), float(theirs.detach()), correct, supervised))
        return ours

    monkeypatch.setattr(ConversationTrainer, "compute_loss", both)
    train(recipe("sft", tmp_path / "run", [talks], train={"gradient_accumulation_steps": 2}, evaluation=None))
    assert len(compared) == 8
    for ours, theirs, _, _ in compared:
        assert ours == pytest.approx(theirs, rel=1e-6)
    accuracies = [line["token_accuracy"] for line in metrics(tmp_path / "run") if "token_accuracy" in line]
    for accuracy, first, second in zip(accuracies, compared[::2], compared[1::2], strict=True):
        assert accuracy == pytest.approx((first[2] + second[2]) / (first[3] + second[3]))


def test_figures_by_source_add_up_to_the_whole_and_name_no_private_one(tmp_path, talks, write_rows):
    rows = [{"prompt": f"Quanto fa {i}?", "response": f"Fa {i}.", "lang": "it"} for i in range(30)]
    held = [{"path": write_rows(rows[:6], "x.jsonl"), "alias": "sums"}, {"path": write_rows(rows[6:9], "y.jsonl")}]
    sources = [{"path": str(talks), "alias": "talks"}, {"path": write_rows(rows, "secret.jsonl"), "private": True}]
    data = {"sources": sources, "validation_sources": held, "validation_size": 0.01}
    train(recipe("sft", tmp_path / "run", [], data=data))
    lines = metrics(tmp_path / "run")
    seen = {key for line in lines for key in line if "/source/" in key and key.startswith(("loss", "eval_loss"))}
    assert seen == {"loss/source/talks", "loss/source/private source 2", "eval_loss/source/sums",
                    f"eval_loss/source/{held[1]['path']}"}  # fmt: skip
    assert "secret" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    twice = [*sources, {"path": sources[1]["path"]}]  # whoever reads a private file does not name it either
    some = recipe(
        "sft", tmp_path / "twice", [], data={**data, "sources": twice}, train={"max_steps": 1}, evaluation=None
    )
    train(some)
    assert "secret" not in (tmp_path / "twice" / "metrics.jsonl").read_text()
    evaluation = next(line for line in lines if "eval_loss" in line)
    parts = [evaluation[key] for key in sorted(seen) if key.startswith("eval")]
    assert min(parts) <= evaluation["eval_loss"] <= max(parts)


def test_losses_by_language_add_up_to_the_whole(tmp_path, talks):
    train(recipe("sft", tmp_path / "run", [talks]))
    for line in metrics(tmp_path / "run"):
        for name in ("loss", "eval_loss"):
            if name in line:
                low, high = sorted((line[f"{name}/it"], line[f"{name}/en"]))
                assert low <= line[name] <= high


def test_one_language_has_the_whole_loss(tmp_path, write_rows, chats):
    only = write_rows([row for row in chats if row["language"] == "it"] * 3)
    train(recipe("sft", tmp_path / "run", [only]))
    line = next(line for line in metrics(tmp_path / "run") if "loss" in line)
    assert line["loss/it"] == pytest.approx(line["loss"])
    assert "loss/en" not in line


def test_tokens_are_counted_without_padding(tmp_path, talks):
    some = recipe(
        "sft", tmp_path / "run", [talks], data={"packing": False, "validation_size": 0}, train={"max_steps": 15}
    )
    data = prepare_data(some)
    train(some)
    last = [line for line in metrics(tmp_path / "run") if "tokens" in line][-1]
    assert last["tokens"] == data.summary.tokens, "15 steps of 2 rows are one epoch of 30"
    assert last["supervised_tokens"] == data.summary.supervised_tokens
    assert last["epoch"] == 1.0


def test_no_telemetry_leaves_the_machine(tmp_path, talks, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry was sent"))
    train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 1}, evaluation=None))


def test_bfloat16_computes_with_float32_masters(tmp_path, talks):
    train(recipe("sft", tmp_path / "run", [talks], model={"dtype": "bfloat16"}, evaluation=None))
    masters = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert {t.dtype for t in final.values()} == {torch.bfloat16}
    assert any(not torch.equal(masters[n], final[n].float()) for n in final), "masters hold more than bfloat16 can"


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_chat_tokens_and_final_is_merged(tmp_path, talks, tied):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = LlamaConfig.from_pretrained(base)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = {"base": str(base), "random_init": False, "adapter": {"type": "lora", "r": 4, "alpha": 8.0}}
    rates = {"max_steps": 4, "learning_rate": 1e-2}
    result = train(recipe("sft", tmp_path / "lora", [talks], model=model, train=rates))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.model_dir))
    assert set(before) == set(after)
    for table in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        changed = (before[table] != after[table]).any(dim=1).nonzero().flatten().tolist()
        assert changed == [2, 3], "the two renamed rows, and no other"
    assert any(not torch.equal(before[name], after[name]) for name in before if "q_proj" in name)
    resumed = steps(tmp_path / "lora")
    assert resumed[4] < resumed[1]
