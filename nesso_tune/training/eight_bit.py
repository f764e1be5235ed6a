"""AdamW with 8-bit moments (`train.optimizer: adamw_8bit`; Dettmers et al., 2022, arXiv:2110.02861), by bitsandbytes.

Each moment is kept as one byte per weight and one float32 scale per block of 256 weights; parameters with fewer than
4096 weights keep float32 moments. A checkpoint holds bytes and scales as they are, so a resumed run has the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nesso_tune.errors import RunEnvironmentError, first_line, is_out_of_memory
from nesso_tune.model.adapters import BITSANDBYTES_INSTALL, training_device
from nesso_tune.recipes.schema import Recipe

OPTIMIZER_KEY = "train.optimizer"
STEP, MOMENTS = "step", ("state1", "state2", "absmax1", "absmax2")  # names of bitsandbytes
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # what each byte stands for: constants, which are not saved
QUANTISED_WEIGHTS = 4096  # from this size on


def check_optimizer(recipe: Recipe) -> None:
    """Checks that bitsandbytes is installed and works on the training device, if the optimizer needs it.

    Raises:
        RunEnvironmentError: if not.
    """
    if recipe.train.optimizer != "adamw_8bit":
        return
    remedy = "or use optimizer: adamw_torch_fused"
    try:
        import bitsandbytes
    except ImportError:
        raise RunEnvironmentError(
            OPTIMIZER_KEY, "adamw_8bit needs bitsandbytes, which is not installed", f"{BITSANDBYTES_INSTALL}, {remedy}"
        ) from None
    try:
        weight = nn.Parameter(torch.ones(QUANTISED_WEIGHTS, device=training_device()))
        weight.grad = torch.ones_like(weight)
        bitsandbytes.optim.AdamW([weight], lr=0.5, optim_bits=8).step()
        works = bool((weight < 1).all())
    except Exception as error:  # the library for this device is missing or does not support it
        if is_out_of_memory(error):
            raise
        works, why = False, f" ({first_line(error)})"
    else:
        why = ""
    if not works:
        raise RunEnvironmentError(
            OPTIMIZER_KEY, f"adamw_8bit does not work on {training_device()}{why}",
            f"run `python -m bitsandbytes` to diagnose it, {remedy}",
        )  # fmt: skip


def is_eight_bit(optimizer: Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes, whose state torch's state dicts cannot hold."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def get_state(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by parameter, on the CPU."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        if own := optimizer.state.get(parameter):
            moments = {moment: own[moment].cpu().contiguous() for moment in MOMENTS if moment in own}
            state[name] = {STEP: torch.tensor(own[STEP]), **moments}
    return state


def set_state(parameters: dict[str, nn.Parameter], optimizer: Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    """Sets the state from `get_state`."""
    for name, saved in state.items():
        device = parameters[name].device
        own = {moment: tensor.to(device) for moment, tensor in saved.items() if moment != STEP}
        if own["state1"].dtype == torch.uint8:
            tables = optimizer.name2qmap  # type: ignore[attr-defined]
            own |= {key: tables[table].to(device) for key, table in TABLES.items()}
        optimizer.state[parameters[name]] = {STEP: int(saved[STEP]), **own}
