"""A frozen base in 4 bits (Dettmers et al., 2023, arXiv:2305.14314), through bitsandbytes.

Weights are quantised from what `load_model` loads, layer by layer, on the device that trains: the same weights give
the same bits at every start and at every resume, and checkpoints need not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nesso_tune.errors import RecipeError, RunEnvironmentError, first_line

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


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
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
