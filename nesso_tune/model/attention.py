"""Which attention kernel computes. Packed documents are isolated in every one of them, by position ids alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch

from nesso_tune.errors import RecipeError

Kernel = Literal["flash_attention_2", "sdpa", "eager"]


def choose_attention(wanted: str) -> Kernel:
    """The kernel for `model.attention`; `auto` takes flash-attn where it is installed and a GPU is there.

    Raises:
        RecipeError: if flash is asked for and cannot run here.
    """
    can_flash = torch.cuda.is_available() and find_spec("flash_attn") is not None
    if wanted == "flash" and not can_flash:
        missing = "flash-attn is not installed" if torch.cuda.is_available() else "there is no GPU"
        raise RecipeError(
            "model.attention", f"flash cannot run: {missing}", "pip install 'nesso-tune[flash]', or set attention: auto"
        )
    if wanted == "flash" or (wanted == "auto" and can_flash):
        return "flash_attention_2"
    return "eager" if wanted == "eager" else "sdpa"
