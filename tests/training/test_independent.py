"""Whole runs against a trainer in plain torch that shares no code: losses, norms, rates and weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from nesso_tune import load_tokenizer
from nesso_tune.data.prepare import prepare_data
from nesso_tune.run import train
from nesso_tune.training.dataset import RunDataset
from tests.support import independent_trainer as independent
from tests.support.runs import BASE, metrics, recipe, thorough

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
SHAPES = {
    "llama": lambda size: LlamaConfig(vocab_size=size, tie_word_embeddings=False, **SMALL),
    "gemma3": lambda size: Gemma3TextConfig(vocab_size=size, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                                            layer_types=["sliding_attention", "full_attention"], **SMALL),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, tie_word_embeddings=True, **SMALL),
}  # fmt: skip
TRAIN = {"max_steps": None, "num_epochs": 2.0, "micro_batch_size": 2, "gradient_accumulation_steps": 3,
         "learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}  # fmt: skip
SCHEDULE = {"warmup_steps": 2, "constant_ratio": 0.8, "min_ratio": 0.3}
DPO = {"beta": 0.5, "loss": {"sigmoid": 1.0, "sft": 0.2}, "ld_alpha": 0.5}
SETTINGS = independent.Settings(**{key: TRAIN[key] for key in ("learning_rate", "weight_decay", "max_grad_norm")},
                                **SCHEDULE, beta=0.5, sft=0.2, ld_alpha=0.5)  # fmt: skip


def base_of(folder, shape):
    """A base with the chat tokens and random weights whose logits are far apart."""
    tokenizer = load_tokenizer(str(BASE))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(SHAPES[shape](len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", [pytest.param(name, marks=thorough if name == "qwen2" else ()) for name in SHAPES])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_is_that_of_a_trainer_in_plain_torch(tmp_path, request, method, shape):
    """Ours in float32 against float64: losses within 1e-6 of their size, all weights within 1e-5."""
    file = request.getfixturevalue("talks" if method == "sft" else "pairs")
    base = base_of(tmp_path / "base", shape)
    some = recipe(
        method, tmp_path / "run", [file], model={"base": str(base), "random_init": False},
        data={"sequence_len": 96, "validation_size": 0}, train={**TRAIN, "schedule": SCHEDULE}, evaluation=None,
        checkpoint={"every_steps": 100}, **({"dpo": DPO} if method == "dpo" else {}),
    )  # fmt: skip
    train(some)
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    steps = documents_of(some, file, len(lines))
    step_loss = {"sft": independent.sft_step, "dpo": independent.dpo_step}[method]
    theirs = independent.train(base, steps, step_loss, SETTINGS)
    assert [line["loss"] for line in lines] == pytest.approx(theirs.losses, rel=1e-6)
    assert [line["learning_rate"] for line in lines] == pytest.approx(theirs.rates, rel=1e-9)
    assert [line["grad_norm"] for line in lines] == pytest.approx(theirs.norms, rel=1e-5)
    assert min(theirs.norms) > TRAIN["max_grad_norm"], "every step is clipped"
    ours = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert set(ours) == set(theirs.weights)
    start = load_file(base / "model.safetensors")
    for name, weight in ours.items():
        torch.testing.assert_close(weight.double(), theirs.weights[name], rtol=0, atol=1e-5)
        assert float((weight - start[name]).abs().max()) > 1e-3, name


def documents_of(some, file, steps):
    """The documents of each step of a run, as the product shuffles and packs them; the last step wraps around."""
    data = prepare_data(some)
    size = TRAIN["micro_batch_size"] * TRAIN["gradient_accumulation_steps"]
    order = RunDataset(data.stream, steps * size)
    assert len(data.stream.epoch(0)) * TRAIN["num_epochs"] % size, "the last batch goes beyond the last epoch"
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    rows = [row.get("messages", row) for row in rows]
    place = data.stream.documents.location
    return [
        [
            rows[int(place(entry).rsplit(":", 1)[1]) - 1]
            for entry in order.records(range(step * size, (step + 1) * size))
        ]
        for step in range(steps)
    ]
