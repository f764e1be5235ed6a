"""SFT and DPO side by side: everything in which their training differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel
from trl import DPOConfig, SFTConfig

from nesso_tune.model.lm_head import ForwardPath
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.training.arguments import dpo_arguments, sft_arguments
from nesso_tune.training.dataset import Collator, ConversationCollator, PairCollator
from nesso_tune.training.dpo import PairTrainer, dpo_metrics, evaluate_dpo
from nesso_tune.training.evaluation import EvaluateLoss
from nesso_tune.training.grouped_metrics import Groups, MetricSpec
from nesso_tune.training.sft import SFT_METRICS, ConversationTrainer, evaluate_sft


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        trainer: its trainer class.
        metrics: loss and metrics of training and validation rows.
        evaluate_loss: computes them over validation batches.
        arguments: TRL's arguments for a plan and a model.
        collator: collator for a model's forward path, padding token, groups, and the length that rows are padded to
            (None for no fixed length).
    """

    trainer: type[ConversationTrainer] | type[PairTrainer]
    metrics: MetricSpec
    evaluate_loss: EvaluateLoss
    arguments: Callable[[Plan, PreTrainedModel], SFTConfig | DPOConfig]
    collator: Callable[[ForwardPath, int, Groups, int | None], Collator]


def method_of(recipe: Recipe) -> Method:
    """The training method of a recipe."""
    if isinstance(recipe, SFTRecipe):
        arguments = partial(sft_arguments, recipe)
        return Method(ConversationTrainer, SFT_METRICS, evaluate_sft, arguments, _conversation_collator)
    metrics = dpo_metrics(recipe.dpo.loss)
    return Method(PairTrainer, metrics, evaluate_dpo, partial(dpo_arguments, recipe), _pair_collator)


def _conversation_collator(path: ForwardPath, pad_id: int, groups: Groups, length: int | None) -> Collator:
    return ConversationCollator(pad_id, groups, path.padding_free, length, path.packs_by_position_ids)


def _pair_collator(path: ForwardPath, pad_id: int, groups: Groups, length: int | None) -> Collator:
    return PairCollator(pad_id, groups, path.padding_free)
