"""nesso-tune: SFT and DPO post-training from a base model to a bilingual assistant.

    from nesso_tune import train

    result = train("quickstart/sft")
    result.history, result.plot(), result.trainer.model

Recipes
    load_recipe             Read and validate a recipe: a YAML file, the name of a built-in recipe, keys, or YAML text.
    SFTRecipe, DPORecipe    The two kinds of recipe, with `replace` and `to_yaml`. docs/recipe.md lists their keys.
    make_plan, Plan, World  Steps, batch sizes, learning-rate schedule and memory of a run on some devices.
    lr_multiplier           The learning-rate schedule as a function of the step.

Data
    prepare_data            Read, clean and encode the data of a recipe, as PreparedData.
    PreparedData            Rows for training and validation, the tokenizer, and what was dropped.
    preview                 Render training examples with their supervised tokens marked.
    load_tokenizer          The tokenizer of a model, with its chat template.
    encode_conversation     Token ids and labels of one conversation.
    Conversation, Message, PreferencePair
                            One training example, and its parts.

Training
    train                   Run a recipe: prepare the data, train, evaluate, save. Takes callbacks, a model, data sets.
    TrainResult             The model, its metrics, `history`, `plot()` and the trainer.
    answer_metric           Make a function of an Answer a metric, for evaluations, train.best_metric and gates.

Models
    generate                Answers of a model to prompts: SampledAnswer, by a Sampling.
    evaluate                Results of models on a suite of tasks, as ModelResult; EvaluationOptions limit it.

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

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Here, before anything else: accelerate and peft import bitsandbytes if it is installed, which on some CPUs warns about
# a kernel that is not used.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULES = {
    "Answer": "nesso_tune.generation.answers",
    "Conversation": "nesso_tune.conversation",
    "DPORecipe": "nesso_tune.recipes.schema",
    "DataError": "nesso_tune.errors",
    "EvaluationOptions": "nesso_tune.evaluation.runner",
    "GateRefused": "nesso_tune.errors",
    "Message": "nesso_tune.conversation",
    "ModelError": "nesso_tune.errors",
    "ModelResult": "nesso_tune.evaluation.results",
    "NessoError": "nesso_tune.errors",
    "NumericalError": "nesso_tune.errors",
    "Plan": "nesso_tune.planning.plan",
    "Preempted": "nesso_tune.errors",
    "PreferencePair": "nesso_tune.conversation",
    "PreparedData": "nesso_tune.data.prepare",
    "RecipeError": "nesso_tune.errors",
    "RunEnvironmentError": "nesso_tune.errors",
    "SFTRecipe": "nesso_tune.recipes.schema",
    "SampledAnswer": "nesso_tune.generation.sampling",
    "Sampling": "nesso_tune.generation.inference",
    "TrainResult": "nesso_tune.reports.result",
    "World": "nesso_tune.planning.plan",
    "answer_metric": "nesso_tune.metric_registry",
    "encode_conversation": "nesso_tune.chat.tokenizer",
    "evaluate": "nesso_tune.evaluation.runner",
    "generate": "nesso_tune.generation.sampling",
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
    "Answer",
    "Conversation",
    "DPORecipe",
    "DataError",
    "EvaluationOptions",
    "GateRefused",
    "Message",
    "ModelError",
    "ModelResult",
    "NessoError",
    "NumericalError",
    "Plan",
    "Preempted",
    "PreferencePair",
    "PreparedData",
    "RecipeError",
    "RunEnvironmentError",
    "SFTRecipe",
    "SampledAnswer",
    "Sampling",
    "TrainResult",
    "World",
    "answer_metric",
    "encode_conversation",
    "evaluate",
    "generate",
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
    from nesso_tune.data.prepare import PreparedData, prepare_data
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
    from nesso_tune.evaluation.results import ModelResult
    from nesso_tune.evaluation.runner import EvaluationOptions, evaluate
    from nesso_tune.generation.answers import Answer
    from nesso_tune.generation.inference import Sampling
    from nesso_tune.generation.sampling import SampledAnswer, generate
    from nesso_tune.lr_schedule import lr_multiplier
    from nesso_tune.metric_registry import answer_metric
    from nesso_tune.planning.plan import Plan, World
    from nesso_tune.planning.planner import make_plan
    from nesso_tune.recipes.load import load_recipe
    from nesso_tune.recipes.schema import DPORecipe, SFTRecipe
    from nesso_tune.reports.preview import preview
    from nesso_tune.reports.result import TrainResult
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
