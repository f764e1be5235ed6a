"""What FULL_SHARD cannot do is refused before anything is trained, and what was asked for is what runs."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.training.fsdp import check_sharded, fsdp_arguments
from nesso_tune.training.method import dpo_arguments, sft_arguments
from tests.support.runs import recipe

SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def llama(**config):
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **config))


class NoBlocks(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)


def test_blocks_are_wrapped_by_the_models_own_class():
    config = fsdp_arguments(llama(), checkpointing=True, shards=2, replicas=1)["fsdp_config"]
    assert config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert (config["version"], config["reshard_after_forward"], config["activation_checkpointing"]) == (2, True, True)


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(RecipeError, match=r"distributed.fsdp: NoBlocks does not declare its transformer blocks; set"):
        fsdp_arguments(NoBlocks(LlamaConfig(**SMALL)), checkpointing=False, shards=2, replicas=1)


@pytest.mark.parametrize(
    "model", [lambda: llama(attention_dropout=0.1), lambda: AutoModelForCausalLM.from_config(GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.1, embd_pdrop=0.0))],
)  # fmt: skip
def test_blocks_that_drop_at_random_are_not_computed_twice(model):
    with pytest.raises(RecipeError, match="different dropout masks"):
        fsdp_arguments(model(), checkpointing=True, shards=2, replicas=1)
    fsdp_arguments(model(), checkpointing=False, shards=2, replicas=1)


def test_torchs_wrapper_would_indeed_draw_other_masks():
    """The reason for that refusal: when this fails, the refusal can go."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    layer = checkpoint_wrapper(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)), preserve_rng_state=False)
    x = torch.randn(8, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    kept = (y != 0).float() * 2  # the slope of every unit that was kept
    assert not torch.allclose(x.grad, kept @ layer._checkpoint_wrapped_module[0].weight)


def test_plain_weights_are_not_taken_for_sharded():
    with pytest.raises(RunEnvironmentError, match="the weights are not sharded"):
        check_sharded(llama(), shards=2, replicas=1)


@pytest.mark.parametrize(("method", "arguments"), [("sft", sft_arguments), ("dpo", dpo_arguments)])
def test_one_process_uses_one_gpu(method, arguments, monkeypatch):
    """transformers would split every batch over all GPUs that it sees."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 8))
    some = recipe(method, "run", ["x.jsonl"])
    assert arguments(some, make_plan(some, World(1)), llama())._n_gpu == 1
