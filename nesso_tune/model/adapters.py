"""LoRA, DoRA and QLoRA adapters.

QLoRA (Dettmers et al., 2023, arXiv:2305.14314) trains LoRA on a frozen base in 4 bits, with bitsandbytes. The weights
are quantised layer by layer after `load_model`, on the training device. Quantisation is deterministic, so checkpoints
do not contain the base.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nesso_tune.errors import RecipeError, RunEnvironmentError, first_line, is_out_of_memory
from nesso_tune.recipes.sections import LoraSection, ModelSection

ADAPTER_TYPE_KEY = "model.adapter.type"
TARGET_MODULES_KEY = "model.adapter.target_modules"
BITSANDBYTES_INSTALL = "pip install 'bitsandbytes>=0.49,<0.51'"
NF4 = {"quant_type": "nf4", "compress_statistics": True}  # with double quantisation of the block scales
CHECKED_WEIGHTS = 4096  # more than one block of the double quantisation


def check_adapter(section: LoraSection | None) -> None:
    """Checks that bitsandbytes is installed and works on the training device, if the adapter needs it.

    Raises:
        RunEnvironmentError: if not.
    """
    if section is None or section.type != "qlora":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise RunEnvironmentError(
            ADAPTER_TYPE_KEY, "qlora needs bitsandbytes, which is not installed",
            f"{BITSANDBYTES_INSTALL}, or use type: lora",
        ) from None  # fmt: skip
    try:
        _quantise_and_back(torch.linspace(-1, 1, CHECKED_WEIGHTS).reshape(-1, 64), torch.float32)
    except Exception as error:  # the library for this device is missing or does not support it
        if is_out_of_memory(error):
            raise
        raise RunEnvironmentError(
            ADAPTER_TYPE_KEY, f"bitsandbytes cannot quantise on {training_device()} ({first_line(error)})",
            "run `python -m bitsandbytes` to diagnose it, or use type: lora",
        ) from None  # fmt: skip


def adapt(
    model: PreTrainedModel,
    section: ModelSection,
    new_ids: list[int],
    seed: int,
    merging: bool = False,
    frozen: str | None = None,
) -> PeftModel:
    """Adds an adapter to `model` in place and freezes all other weights.

    Args:
        model: the base as loaded.
        section: the type of the adapter, and the precision in which the base computes.
        new_ids: token ids whose rows of the embedding and the head are trained too.
        seed: seed of the adapter's initial weights, which are then equal on all ranks.
        merging: whether the adapter will be merged. The base of QLoRA then has plain layers with the dequantised
            weights. Merged into these weights, the adapter gives the model that was trained and evaluated; merged into
            the unquantised base, it would differ by the quantisation error. Weights stay in float32, so that the
            merged weights are rounded once, when they are written.
        frozen: precision of the frozen weights; by default the recipe's, `model.dtype`.

    Returns:
        peft's wrapper, which can merge the adapter. Training uses `model` itself, because trainers and FSDP expect its
        module names.

    Raises:
        RecipeError: if the model does not support the adapter.
    """
    adapter = section.adapter
    assert adapter is not None
    config = lora_config(adapter, model, new_ids)
    if adapter.type == "qlora":
        (fake_quantise if merging else quantise)(model, getattr(torch, section.dtype))
        model.is_loaded_in_4bit = not merging  # read by peft
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # unsupported layers
        raise RecipeError(
            "model.adapter", f"peft cannot adapt {type(model).__name__} ({first_line(error)})",
            "set other model.adapter.target_modules, or adapter: null",
        ) from None  # fmt: skip
    model.is_loaded_in_4bit = False  # otherwise TRL would cast the adapter's weights to bfloat16
    if not merging:  # after peft has initialised the trained weights from those in float32
        hold_frozen_weights(model, getattr(torch, frozen or section.dtype))
    return adapted


def hold_frozen_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Stores the frozen matrices of linear layers, the embedding and the head in `dtype`, in place.

    Linear layers and the head compute as before: autocast rounds their weights to the same values. Rows of the
    embedding are rounded, if the base has them in float32. Norms and biases stay in float32, and so does the residual
    stream, whose precision is that of the embedding's output.
    """
    if dtype == torch.float32:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = [module for table in tables if table is not None for module in table.modules()]
    modules += [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is not None and not weight.requires_grad and weight.dtype == torch.float32:
            weight.data = weight.data.to(dtype)
    tables[0].register_forward_hook(_to_float32)


def lora_config(section: LoraSection, model: PreTrainedModel, new_ids: list[int]) -> LoraConfig:
    """The peft configuration of an adapter.

    The rows of new tokens, such as the control tokens of the chat template, are trained beside the adapter in the
    embedding and in the head, tied or not: a model with an untrained end token never stops.

    Raises:
        RecipeError: if a target module does not exist or cannot have an adapter.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {name: new_ids for name, module in model.named_modules() if any(module is table for table in tables)}
    tied = model.config.get_text_config().tie_word_embeddings
    targets = section.target_modules
    _check_target_modules(targets, model)
    return LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_dora=section.type == "dora",
        target_modules=targets if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets),
        trainable_token_indices=None if not new_ids else new_ids if tied else names,
        task_type="CAUSAL_LM",
    )


def _check_target_modules(targets: str | tuple[str, ...], model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    heads = [name for name, module in model.named_modules() if module is head]
    available = sorted({name.rsplit(".", 1)[-1] for name in names if name not in heads})
    for target in () if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets:
        matches = [name for name in names if f".{name}".endswith(f".{target}")]
        if not matches:
            problem = f"the model has no layer `{target}`"
        elif set(matches) <= set(heads):
            problem = f"`{target}` is the LM head: the loss uses the head's own weights, without an adapter"
        else:
            continue
        raise RecipeError(TARGET_MODULES_KEY, problem, f"use all-linear, or some of {', '.join(available)}")


def quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replaces every linear layer except the head by a 4-bit layer that computes in `dtype`, in place.

    Raises:
        RecipeError: if the model has no linear layers.
    """
    import bitsandbytes as bnb

    device = training_device()
    for name, layer in list(_linear_layers(model)):
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta", **NF4
        )
        quantised.weight = bnb.nn.Params4bit(layer.weight.detach().to(dtype), module=quantised, **NF4)
        quantised.bias = layer.bias
        # some CPUs would evaluate with weights that are rounded once more, and then train without gradients
        quantised.support_avx512bf16_for_cpu = False
        quantised.register_forward_pre_hook(_cast_inputs(dtype))
        quantised.register_state_dict_post_hook(_remove_quantisation_state)
        model.set_submodule(name, quantised.to(device))  # `to` quantises the weight


def fake_quantise(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Quantises and dequantises the weights that `quantise` would replace, in place.

    Raises:
        RecipeError: if the model has no linear layers.
    """
    for _, layer in _linear_layers(model):
        layer.weight.data.copy_(_quantise_and_back(layer.weight.detach(), dtype))


def _quantise_and_back(weight: Tensor, dtype: torch.dtype) -> Tensor:
    import bitsandbytes as bnb

    quantised, state = bnb.functional.quantize_4bit(weight.to(training_device(), dtype), **NF4)
    dequantised: Tensor = bnb.functional.dequantize_4bit(quantised, state)
    return dequantised


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    head, found = model.get_output_embeddings(), False
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            found = True
            yield name, module
    if not found:
        raise RecipeError(
            ADAPTER_TYPE_KEY, f"qlora finds no linear layers in {type(model).__name__} to quantise", "use type: lora"
        )


def _cast_inputs(dtype: torch.dtype) -> Any:
    """A forward pre-hook: the output then has the precision of the computation, as under autocast."""
    return lambda module, inputs: (inputs[0].to(dtype), *inputs[1:])


def _to_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook."""
    return output.float()


def _remove_quantisation_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict hook: the scales belong to the frozen base and are recomputed, so they are not saved."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def training_device() -> torch.device:
    """The device of this process, known before the process group is initialised."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK") or "0")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
