"""nesso-tune: SFT and DPO post-training from a base model to a bilingual assistant.

    from nesso_tune import load_recipe, train

    train(load_recipe("quickstart/sft"))

Recipes
    load_recipe             Read and validate a recipe: a YAML file or the name of a built-in recipe.
    SFTRecipe, DPORecipe    The two kinds of recipe. docs/recipe.md lists their keys.
    make_plan               Steps, batch sizes, learning-rate schedule and memory of a run, before it starts.
    lr_multiplier           The learning-rate schedule as a function of the step.

Data
    prepare_data            Read, clean and encode the data of a recipe.
    preview                 Render training examples with their supervised tokens marked.
    load_tokenizer          The tokenizer of a model, with its chat template.
    encode_conversation     Token ids and labels of one conversation.
    Conversation, Message, PreferencePair
                            One training example, and its parts.

Training
    train                   Run a recipe: prepare the data, train, evaluate, save.

Errors, each with the exit code of the command line
    NessoError              Base class (1).
    RecipeError             Invalid or contradictory recipe (2).
    DataError               Unreadable or unusable data (3).
    ModelError              Missing, damaged or unsupported model or tokenizer (4).
    RunEnvironmentError     Disk, device, network, run directory or checkpoint (5).
    NumericalError          NaN or infinity in training (6).
    GateRefused             A model that does not pass its evaluation gate (7).
    Preempted               Stopped on request after saving a checkpoint (75).

`help(nesso_tune.train)` shows the documentation of one name. Names are imported on first use: `import nesso_tune` does
not load torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

_MODULES = {
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

# A literal list: type checkers read it as the explicit exports.
__all__ = [
    "Conversation",
    "DPORecipe",
    "DataError",
    "GateRefused",
    "Message",
    "ModelError",
    "NessoError",
    "NumericalError",
    "Preempted",
    "PreferencePair",
    "RecipeError",
    "RunEnvironmentError",
    "SFTRecipe",
    "encode_conversation",
    "load_recipe",
    "load_tokenizer",
    "lr_multiplier",
    "make_plan",
    "prepare_data",
    "preview",
    "train",
]
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
    if name not in _MODULES:
        raise AttributeError(f"module 'nesso_tune' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return ["__version__"] if _called_by_pydoc() else [*__all__, "__version__"]


def _called_by_pydoc() -> bool:
    """Whether `help(nesso_tune)` asks: it would add every method that the classes inherit, 2,000 lines of them."""
    frame = sys._getframe()
    while frame.f_back is not None and not frame.f_code.co_filename.endswith("pydoc.py"):
        frame = frame.f_back
    return frame.f_code.co_filename.endswith("pydoc.py")
