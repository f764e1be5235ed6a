"""nesso-tune: from a base model to a bilingual assistant, by SFT and then DPO.

Names are imported when first used, so that `import nesso_tune` is instant and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Conversation": "nesso_tune.conversation",
    "DPORecipe": "nesso_tune.recipes.schema",
    "DataError": "nesso_tune.errors",
    "GateRefused": "nesso_tune.errors",
    "Message": "nesso_tune.conversation",
    "ModelError": "nesso_tune.errors",
    "NessoError": "nesso_tune.errors",
    "NumericalError": "nesso_tune.errors",
    "Preempted": "nesso_tune.errors",
    "PreferencePair": "nesso_tune.conversation",
    "RecipeError": "nesso_tune.errors",
    "RunEnvironmentError": "nesso_tune.errors",
    "SFTRecipe": "nesso_tune.recipes.schema",
    "encode_conversation": "nesso_tune.chat.tokenizer",
    "load_recipe": "nesso_tune.recipes.load",
    "load_tokenizer": "nesso_tune.chat.tokenizer",
    "lr_multiplier": "nesso_tune.lr_schedule",
    "make_plan": "nesso_tune.planning.planner",
    "prepare_data": "nesso_tune.data.prepare",
    "preview": "nesso_tune.reports.preview",
    "train": "nesso_tune.run",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from nesso_tune.chat.tokenizer import encode_conversation, load_tokenizer
    from nesso_tune.conversation import Conversation, Message, PreferencePair
    from nesso_tune.data.prepare import prepare_data
    from nesso_tune.errors import (
        DataError,
        GateRefused,
        ModelError,
        NessoError,
        NumericalError,
        Preempted,
        RecipeError,
        RunEnvironmentError,
    )
    from nesso_tune.lr_schedule import lr_multiplier
    from nesso_tune.planning.planner import make_plan
    from nesso_tune.recipes.load import load_recipe
    from nesso_tune.recipes.schema import DPORecipe, SFTRecipe
    from nesso_tune.reports.preview import preview
    from nesso_tune.run import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nesso_tune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
