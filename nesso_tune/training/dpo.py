"""Direct preference optimization on TRL's DPOTrainer, with precomputed log-probabilities of the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl import DPOTrainer

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.errors import NumericalError
from nesso_tune.recipes.rules import SORTED_LOSSES
from nesso_tune.training.dataset import NON_MODEL_KEYS, Batch, CountedBatch
from nesso_tune.training.fsdp import has_dropout
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups, MetricSpec
from nesso_tune.training.losses import (
    SFT,
    answer_log_probs,
    nll_loss,
    preference_losses,
)
from nesso_tune.training.trainer import BaseTrainer

PAIR_METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
                "logps/rejected")  # fmt: skip
SFT_LOSS, PREFERENCE_LOSS = "loss_sft", "loss_preference"  # the unweighted sft term; the sum of all other terms

Reference = dict[int, tuple[float, float]]  # pair -> log-probabilities of its chosen and rejected answers


class PairTrainer(BaseTrainer, DPOTrainer):
    """The loss of an optimizer step is TRL's loss of all its pairs, whatever the micro-batch size.

    Its terms are means over the pairs of a step, and `sft` is a mean over the tokens of their chosen answers. TRL takes
    that mean per micro batch, which gives more weight to tokens in micro batches of short answers.

    `reference` must be set before the first step.
    """

    reference: Reference

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._built = False
        super().__init__(*arguments, **options)
        self._built = True

    @property
    def is_fsdp_enabled(self) -> bool:
        """False in TRL's constructor, which with FSDP would load a second model from disk as the reference."""
        return self._sharded and self._built

    @is_fsdp_enabled.setter
    def is_fsdp_enabled(self, value: bool) -> None:
        self._sharded = value

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The pairs are already tokenized."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """`reference.py` computes the reference once, with the wrapped model."""
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Tokens of the chosen answers of a step, over all processes; None without an sft term."""
        if SFT not in self.loss_types or not batch_samples:
            return None
        count = torch.tensor(sum(batch["chosen_tokens"] for batch in batch_samples))
        return count if self.accelerator.num_processes == 1 else self.sum_over_processes(count)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro batch; its mean over micro batches and processes is the loss of the step."""
        extra = {name: inputs.pop(name) for name in NON_MODEL_KEYS}
        inputs |= self.reference_of(extra["entries"])
        calls: list[Any] = []

        def recording_model(**kwargs: Any) -> Any:
            calls.append(model(**kwargs))
            return calls[-1]

        losses = preference_losses(self, recording_model, inputs)
        state, outputs = self.run_state, calls[0]
        if self.state.global_step == 0:
            self._assert_policy_is_reference(outputs.log_probs, inputs)
        # each step has the same weight in the mean over several steps of a log line
        token_weight = None if num_items_in_batch is None else 1 / num_items_in_batch.double()
        scored = ScoredPairs(outputs, inputs, extra["group_ids"], extra["chosen_tokens"])
        add_dpo_metrics(self, state.metrics, scored, losses, token_weight)
        state.tokens += extra["tokens"]
        state.supervised_tokens += extra["supervised_tokens"]
        preference = losses.mean()
        if num_items_in_batch is None:
            return preference
        micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        sft_weight = float(self.loss_weights[self.loss_types.index(SFT)])
        return preference + sft_weight * nll_loss(outputs.log_probs.chunk(2)[0], num_items_in_batch, micro_batches)

    def reference_of(self, pairs: Sequence[int]) -> dict[str, Tensor]:
        """The log-probabilities of some pairs under the reference, on the device."""
        both = torch.tensor([self.reference[pair] for pair in pairs])
        if torch.cuda.is_available():
            both = both.pin_memory()  # so that the copy does not wait
        both = both.to(self.accelerator.device, non_blocking=True)
        return {"ref_chosen_logps": both[:, 0], "ref_rejected_logps": both[:, 1]}

    @torch.no_grad()
    def _assert_policy_is_reference(self, log_probs: Tensor, inputs: dict[str, Any]) -> None:
        """Checks that before the first update every log-ratio of policy and reference is 0, up to rounding.

        Raises:
            NumericalError: if not, because then the reference belongs to another model.
        """
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        tokens = inputs["completion_mask"].sum(dim=1)
        policy = answer_log_probs(log_probs, inputs["completion_mask"], self.ld_alpha)
        differences = (policy - reference).abs() / tokens
        beyond = differences > rounding_limit(tokens, self.args.bf16)
        if not beyond.any():
            return  # NaN passes: the check of the loss reports it
        difference = float(differences[beyond].max())
        what = f"the policy differs from the reference by {difference:.2g} nats/token before the first update"
        if has_dropout(self.accelerator.unwrap_model(self.model)):
            raise NumericalError(
                "step 1", f"{what}: the model has dropout",
                "set the dropout in the base's config.json (attention_dropout, resid_pdrop, …) to 0",
            )  # fmt: skip
        raise NumericalError(
            "step 1", what,
            "delete the folder `reference` of the cache (NESSO_TUNE_CACHE) and start again with --overwrite",
        )  # fmt: skip


def rounding_limit(tokens: Tensor, bf16: bool) -> Tensor:
    """Largest difference that rounding explains between two log-probabilities of answers, in nats/token.

    In bfloat16, another kernel or another shape of the batch rounds hidden states otherwise, and one rounding moves the
    log-probability of its token by 0.012 (standard deviation; 0.12 was the largest of a measurement). The mean over the
    tokens of an answer moves by 1 / sqrt(tokens) of that. Ten standard deviations are allowed, and at least 0.02.

    Args:
        tokens: number of tokens of each answer.
        bf16: whether matrix products are in bfloat16.
    """
    if not bf16:
        return torch.full_like(tokens, 1e-4, dtype=torch.float32)
    return (0.12 / tokens.sqrt()).clamp(min=0.02)


class ScoredPairs(NamedTuple):
    """The outputs of the model on a batch of pairs.

    Attributes:
        outputs: of the fused head.
        inputs: of the model, on the device.
        group_ids: group of each pair, [pairs].
        chosen_tokens: number of tokens of all chosen answers; they come first in `inputs["supervised_index"]`.
    """

    outputs: Any
    inputs: dict[str, Any]
    group_ids: Tensor
    chosen_tokens: int


@torch.no_grad()
def evaluate_dpo(trainer: PairTrainer, batches: Iterable[CountedBatch], groups: Groups) -> dict[str, float]:
    """Loss and metrics over batches of pairs, in total and by group; arguments as of `sft.evaluate_sft`.

    The loss is that of all pairs as a single step: a mean over all pairs and over all tokens of their chosen answers. A
    loss that sorts the pairs is a mean over batches, weighted by their number of pairs.
    """
    metrics = GroupedMetrics(trainer.run_state.metrics.spec, groups, trainer.accelerator.device)
    for batch, counted in batches:
        scored, pairs = score_pairs(trainer, batch)
        if counted:
            scored.inputs.update(trainer.reference_of(pairs))
            losses = preference_losses(trainer, lambda _outputs=scored.outputs, **_: _outputs, scored.inputs)
            add_dpo_metrics(trainer, metrics, scored, losses)
    return {f"eval_{name}": value for name, value in metrics.means(trainer.sum_over_processes).items()}


@torch.no_grad()
def score_pairs(trainer: PairTrainer, batch: Batch) -> tuple[ScoredPairs, list[int]]:
    """Runs the model on a batch of the collator; also returns the index of each pair."""
    inputs = send_to_device(batch, trainer.accelerator.device)
    extra = {name: inputs.pop(name) for name in NON_MODEL_KEYS}
    model_inputs = {name: value for name, value in inputs.items() if name != "completion_mask"}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**model_inputs, labels=labels, fused_lm_head=True)
    return ScoredPairs(outputs, inputs, extra["group_ids"], extra["chosen_tokens"]), extra["entries"]


@torch.no_grad()
def pair_log_likelihood(trainer: PairTrainer, batch: Batch) -> float:
    """The summed log-probability of all answers in a batch of the collator."""
    scored, _ = score_pairs(trainer, batch)
    return float(scored.outputs.log_probs.flatten().index_select(0, scored.inputs["supervised_index"]).double().sum())


def dpo_metrics(losses: Mapping[Any, float]) -> MetricSpec:
    """The metrics of a `dpo.loss`: the loss, with an sft term also its two parts, and TRL's metrics."""
    has_preference, sft_weight = any(name != SFT for name in losses), losses.get(SFT)
    metrics = ("token_accuracy", *PAIR_METRICS, "logps/chosen_shift")
    sorts = any(name in SORTED_LOSSES for name in losses)
    ungrouped = frozenset({"loss", PREFERENCE_LOSS} if sorts else ())
    if sft_weight is None:
        return MetricSpec(("loss", *metrics), ungrouped=ungrouped)
    terms = {PREFERENCE_LOSS: 1.0, SFT_LOSS: sft_weight} if has_preference else {SFT_LOSS: sft_weight}
    return MetricSpec((*terms, *metrics), {"loss": terms}, ungrouped)


@torch.no_grad()
def add_dpo_metrics(
    trainer: PairTrainer,
    metrics: GroupedMetrics,
    scored: ScoredPairs,
    losses: Tensor,
    token_weight: Tensor | None = None,
) -> None:
    """Adds loss and metrics of some pairs.

    Args:
        trainer: has the settings of the loss.
        metrics: of the `dpo_metrics` of its loss.
        scored: the pairs, with the log-probabilities of the reference among the inputs.
        losses: their `preference_losses`.
        token_weight: weight of each token in the sft term; 1 if None.
    """
    outputs, inputs, group_ids, chosen_tokens = scored
    ones = torch.ones(len(group_ids), device=group_ids.device)
    for name, value in _pair_metrics(trainer, outputs, inputs).items():
        metrics.add(name, group_ids, value, ones)
    chosen = inputs["supervised_index"][:chosen_tokens]
    token_groups = group_ids.index_select(0, chosen // outputs.log_probs.shape[1])
    weights = torch.ones(chosen_tokens, device=chosen.device, dtype=torch.float64)
    metrics.add("token_accuracy", token_groups, outputs.is_top1.flatten().index_select(0, chosen).float(), weights)
    if SFT in trainer.loss_types:
        log_probs = outputs.log_probs.flatten().index_select(0, chosen)
        metrics.add(SFT_LOSS, token_groups, -log_probs, weights if token_weight is None else weights * token_weight)
    name = PREFERENCE_LOSS if SFT in trainer.loss_types else "loss"
    if name in metrics.spec.means:  # otherwise sft is the only term
        metrics.add(name, group_ids, losses, ones)


def _pair_metrics(trainer: PairTrainer, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """TRL's metrics of each pair, [pairs], and `logps/chosen_shift`.

    The latter is the log-ratio of the chosen answer under policy and reference, in nats/token.
    """
    mask = inputs["completion_mask"]
    chosen, rejected = answer_log_probs(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)
    chosen_ratio, rejected_ratio = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    return {
        "rewards/accuracies": (chosen_ratio > rejected_ratio).float(),
        "rewards/margins": trainer.beta * (chosen_ratio - rejected_ratio),
        "rewards/chosen": trainer.beta * chosen_ratio,
        "rewards/rejected": trainer.beta * rejected_ratio,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/chosen_shift": chosen_ratio / mask.chunk(2)[0].sum(dim=1),
    }
