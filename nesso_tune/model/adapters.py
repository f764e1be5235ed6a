"""A frozen base in 4 bits (Dettmers et al., 2023, arXiv:2305.14314), through bitsandbytes.

Weights are quantised from what `load_model` loads, layer by layer, on the device that trains: the same weights give
the same bits at every start and at every resume, and checkpoints need not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nesso_tune.errors import RecipeError, RunEnvironmentError, first_line
from nesso_tune.recipes.sections import LoraSection, ModelSection

WHERE = "model.adapter.type"
INSTALL = "pip install 'bitsandbytes>=0.49,<0.51'"
NF4 = {"quant_type": "nf4", "compress_statistics": True}  # with double quantisation of the blocks' scales
PROBE = 4096  # weights: as many blocks as one of the second quantisation spans, and more


def check_quantiser() -> None:
    """Makes sure that bitsandbytes is there and works on the device that trains.

    Raises:
        RunEnvironmentError: if not.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise RunEnvironmentError(
            WHERE, "qlora needs bitsandbytes, which is not installed", f"{INSTALL}, or use type: lora"
        ) from None
    device = training_device()
    try:
        rounded(torch.linspace(-1, 1, PROBE).reshape(-1, 64), torch.float32)
    except Exception as error:  # its library for this device is missing, or not made for it
        raise RunEnvironmentError(
            WHERE, f"bitsandbytes cannot quantise on {device} ({first_line(error)})",
            "`python -m bitsandbytes` says what it finds; or use type: lora",
        ) from None  # fmt: skip


def quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Puts every linear layer but the head into 4 bits, in place; they compute in `dtype`.

    Raises:
        RecipeError: if the model has no such layers.
    """
    import bitsandbytes as bnb

    device = training_device()
    for name, layer in list(_linear_layers(model)):
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta", **NF4
        )
        small.weight = bnb.nn.Params4bit(layer.weight.detach().to(dtype), module=small, **NF4)
        small.bias = layer.bias
        # on some CPUs it would evaluate with weights rounded once more, and go on training without a gradient
        small.support_avx512bf16_for_cpu = False
        small.register_forward_pre_hook(_computing_in(dtype))
        small.register_state_dict_post_hook(_without_constants)
        model.set_submodule(name, small.to(device))  # which quantises


def fake_quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives every layer that `quantise` would quantise the values that it then computes with, in place."""
    for _, layer in _linear_layers(model):
        layer.weight.data.copy_(rounded(layer.weight.detach(), dtype))


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What is left of a weight after 4 bits and back."""
    import bitsandbytes as bnb

    four, scales = bnb.functional.quantize_4bit(weight.to(training_device(), dtype), **NF4)
    back: Tensor = bnb.functional.dequantize_4bit(four, scales)
    return back


def training_device() -> torch.device:
    """Where the one process of a run computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    head, found = model.get_output_embeddings(), False
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            found = True
            yield name, module
    if not found:
        raise RecipeError(
            WHERE, f"qlora finds no linear layers in {type(model).__name__} that it could quantise", "use type: lora"
        )


def _computing_in(dtype: torch.dtype) -> Any:
    """Like any linear layer under autocast, a layer answers in the precision that it computes in."""
    return lambda module, inputs: (inputs[0].to(dtype), *inputs[1:])


def _without_constants(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The scales of a quantised weight are no parameters: they belong to the frozen base, and are made again."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


TARGETS = "model.adapter.target_modules"


def check_adapter(section: LoraSection | None) -> None:
    """Raises RunEnvironmentError if what an adapter needs is not here."""
    if section is not None and section.type == "qlora":
        check_quantiser()


def adapt(
    model: PreTrainedModel, section: ModelSection, new_ids: list[int], seed: int, merging: bool = False
) -> PeftModel:
    """Puts an adapter into `model`, in place, and freezes everything else; seeded, so the same on every process.

    Args:
        model: the base as it was loaded.
        section: says which adapter, and in which precision the base computes.
        new_ids: rows of the tables that are trained too.
        seed: of the adapter's first weights.
        merging: the adapter shall be merged. A quantised base then is made of plain layers that hold what its 4 bits
            stand for: these weights the adapter was trained on, and only with them it is the model that was evaluated.
            The unquantised base would differ from it by the error of the quantisation.

    Returns:
        peft's view of the model, which can merge the adapter. Training goes on with `model` itself: its blocks, names
        and tables stay where trainers and FSDP look for them.

    Raises:
        RecipeError: if the adapter cannot stand on this model.
    """
    adapter = section.adapter
    assert adapter is not None
    config = lora_config(adapter, model, new_ids)
    if adapter.type == "qlora":
        (fake_quantise if merging else quantise)(model, getattr(torch, section.dtype))
        model.is_loaded_in_4bit = not merging  # peft asks for it; TRL would round the adapter's own weights for it
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # of layers that it does not know
        raise RecipeError(
            "model.adapter", f"peft cannot adapt {type(model).__name__} ({first_line(error)})",
            "name other model.adapter.target_modules, or set adapter: null",
        ) from None  # fmt: skip
    model.is_loaded_in_4bit = False
    return adapted


def lora_config(section: LoraSection, model: PreTrainedModel, new_ids: list[int]) -> LoraConfig:
    """The peft configuration of an adapter.

    Rows of tokens that the base never saw (the chat's control tokens) are trained beside the adapter, in the
    embedding and in the head, tied or not: a model whose end token stays untrained never stops.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {name: new_ids for name, module in model.named_modules() if any(module is table for table in tables)}
    tied = model.config.get_text_config().tie_word_embeddings
    targets = section.target_modules
    _check_targets(targets, model)
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_dora=section.type == "dora",
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets),
        trainable_token_indices=None if not new_ids else new_ids if tied else names,
        task_type="CAUSAL_LM",
    )


def _check_targets(targets: str | tuple[str, ...], model: PreTrainedModel) -> None:
    """Raises RecipeError if a named layer does not exist, with the names that do, or cannot have an adapter."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    heads = [name for name, module in model.named_modules() if module is head]
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names if name not in heads})
    for target in () if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets:
        found = [name for name in names if f".{name}".endswith(f".{target}")]
        if not found or set(found) <= set(heads):
            why = "the loss is computed from the head's own weights, without an adapter on it"
            why = why if found else f"the model has no layer `{target}`"
            raise RecipeError(TARGETS, why, f"use all-linear, or some of {', '.join(kinds)}")
