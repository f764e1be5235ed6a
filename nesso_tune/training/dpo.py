"""Preference training on TRL's DPOTrainer, with the reference's log-probabilities computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from trl import DPOTrainer

from nesso_tune.chat.encoding import IGNORED
from nesso_tune.errors import NumericalError
from nesso_tune.recipes.rules import SORTED_LOSSES
from nesso_tune.training.dataset import NON_MODEL_KEYS, Batch, CountedBatch
from nesso_tune.training.fsdp import drops_at_random
from nesso_tune.training.grouped_metrics import GroupedMetrics, Groups, MetricSpec
from nesso_tune.training.trainer import BaseTrainer

METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
           "logps/rejected")  # fmt: skip
SFT = "sft"  # the one term that is a mean over tokens, those of the chosen answers
SFT_LOSS, PREFERENCE_LOSS = "loss_sft", "loss_preference"  # the term by itself; all other terms, added up
Reference = dict[int, tuple[float, float]]  # pair -> log-probability of its chosen and rejected answer


class PairTrainer(BaseTrainer, DPOTrainer):
    """The loss of an optimizer step is TRL's loss of all its pairs, however they are split.

    Its terms are means over the pairs of the step; `sft` is a mean over the tokens of their chosen answers. TRL takes
    the latter over a micro batch, so that a token in a micro batch of short answers would count more.

    `reference` is set before the first step.
    """

    reference: Reference

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._built = False
        super().__init__(*arguments, **options)
        self._built = True

    @property
    def is_fsdp_enabled(self) -> bool:
        """Hidden from TRL's constructor, which under FSDP loads a second model from disk to be the reference."""
        return self._sharded and self._built

    @is_fsdp_enabled.setter
    def is_fsdp_enabled(self, value: bool) -> None:
        self._sharded = value

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Pairs come as token ids."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """The reference is computed by `reference.py`, on the wrapped model, once."""
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The chosen answers' tokens in a step, over all processes; None without the sft term."""
        if SFT not in self.loss_types or not batch_samples:
            return None
        return self.sum_over_processes(sum(chosen_mask(batch).sum() for batch in batch_samples))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro batch, so that its mean over the step's micro batches and processes is the step's."""
        own = {name: inputs.pop(name) for name in NON_MODEL_KEYS}
        inputs |= self.reference_of(own["entries"])
        seen: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        preference = preference_loss(self, recorded, inputs)
        track, outputs = self.track, seen[0]
        if self.state.global_step == 0:
            self._assert_policy_is_reference(outputs.log_probs, inputs)
        # each step counts alike in the mean of several
        each_token = None if num_items_in_batch is None else 1 / num_items_in_batch.double()
        add_dpo_metrics(self, track.tally, outputs, inputs, own["group_ids"], preference, each_token)
        track.tokens += int(own["tokens"])
        track.supervised_tokens += int(inputs["completion_mask"].sum())
        if num_items_in_batch is None:
            return preference
        micro_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        sft = -outputs.log_probs.chunk(2)[0].sum() / num_items_in_batch * micro_batches
        return preference + sft_weight(self) * sft

    def reference_of(self, entries: Tensor) -> dict[str, Tensor]:
        """The reference's log-probabilities of some pairs, on the device."""
        both = torch.tensor([self.reference[int(entry)] for entry in entries], device=self.accelerator.device)
        return {"ref_chosen_logps": both[:, 0], "ref_rejected_logps": both[:, 1]}

    @torch.no_grad()
    def _assert_policy_is_reference(self, log_probs: Tensor, inputs: dict[str, Any]) -> None:
        """Before the first update the policy is its own reference: every log-ratio is 0, up to rounding.

        Raises:
            NumericalError: if not, since then the reference is another model.
        """
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        tokens = inputs["completion_mask"].sum(dim=1)
        alpha = self.ld_alpha
        sums = answer_log_probs(log_probs, inputs["completion_mask"], alpha)
        off = float(((sums - reference).abs() / tokens).max())
        allowed = 2e-2 if self.args.bf16 else 1e-4  # per token
        if off > allowed and drops_at_random(self.accelerator.unwrap_model(self.model)):
            raise NumericalError(
                "step 1", f"the policy differs from its reference by {off:.2g} per token: the base drops at random",
                "set the dropout in the base's config.json (attention_dropout and the like) to 0",
            )  # fmt: skip
        if off > allowed:
            raise NumericalError(
                "step 1", f"the policy differs from its reference by {off:.2g} per token before any update",
                "remove the folder `reference` of the cache (NESSO_TUNE_CACHE) and start anew with --overwrite",
            )  # fmt: skip


def answer_log_probs(log_probs: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> Tensor:
    """Log-probability of each answer, [2 * pairs], from that of each token, [2 * pairs, length - 1].

    With `ld_alpha`, tokens beyond the shorter answer's length count less (LD-DPO, arXiv:2409.06411).
    """
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    mask = completion_mask[:, 1:]
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    beyond = mask.cumsum(dim=1) > shorter[:, None]
    return (log_probs * torch.where(beyond, ld_alpha, 1.0)).sum(dim=1)


def chosen_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Where the tokens of the chosen answers are among what is predicted, [pairs, length - 1]."""
    mask: Tensor = inputs["completion_mask"].chunk(2)[0][:, 1:]
    return mask.bool()


def sft_weight(trainer: PairTrainer) -> float:
    """The weight of the sft term in the loss."""
    return float(trainer.loss_weights[trainer.loss_types.index(SFT)])


def dpo_metrics(losses: Mapping[Any, float]) -> MetricSpec:
    """What is reported of a loss: itself, its two kinds of terms where it has an sft term, and the metrics."""
    of_pairs, weight = any(name != SFT for name in losses), losses.get(SFT)
    metrics = ("token_accuracy", *METRICS, "logps/chosen_shift")
    whole = frozenset({"loss", PREFERENCE_LOSS} if any(name in SORTED_LOSSES for name in losses) else ())
    if weight is None:
        return MetricSpec(("loss", *metrics), whole=whole)
    parts = {PREFERENCE_LOSS: 1.0, SFT_LOSS: weight} if of_pairs else {SFT_LOSS: weight}
    return MetricSpec((*parts, *metrics), {"loss": parts}, whole)


@torch.no_grad()
def add_dpo_metrics(
    trainer: PairTrainer,
    tally: GroupedMetrics,
    outputs: Any,
    inputs: dict[str, Any],
    group_ids: Tensor,
    preference: Tensor | None = None,
    each_token: Tensor | None = None,
) -> None:
    """Adds loss and metrics of some pairs to a tally, by group, from log-probabilities already computed.

    The metrics are TRL's, pair by pair.

    Args:
        trainer: its settings decide.
        tally: of the `dpo_metrics` of its loss.
        outputs, inputs: of the model.
        group_ids: of each pair.
        preference: the pairs' `preference_loss`, where it is known.
        each_token: what a token weighs in the sft term; 1 if not given.
    """
    values = pair_metrics(trainer, outputs, inputs)
    ones = torch.ones(len(group_ids), device=group_ids.device)
    for name, value in values.items():
        tally.add(name, group_ids, value, ones)
    chosen = chosen_mask(inputs)
    right, of_token = outputs.is_top1[: len(group_ids)][chosen], group_ids[:, None].expand(chosen.shape)[chosen]
    tokens = torch.ones(len(right), device=right.device, dtype=torch.float64)
    tally.add("token_accuracy", of_token, right.float(), tokens)
    if SFT in trainer.loss_types:
        log_probs = outputs.log_probs[: len(group_ids)][chosen]
        tally.add(SFT_LOSS, of_token, -log_probs, tokens if each_token is None else tokens * each_token)
    _add_preference_loss(trainer, tally, outputs, inputs, group_ids, preference)


def _add_preference_loss(
    trainer: PairTrainer,
    tally: GroupedMetrics,
    outputs: Any,
    inputs: dict[str, Any],
    group_ids: Tensor,
    whole: Tensor | None,
) -> None:
    """A mean over pairs: TRL's loss of the pairs of each group; of all at once where it is no such mean."""
    name = PREFERENCE_LOSS if SFT in trainer.loss_types else "loss"
    if name not in tally.names:  # sft is the only term
        return
    groups = group_ids[:1] if name in tally.figures.whole else group_ids.unique()
    for group in groups:
        rows = (group_ids == group).nonzero().flatten() if len(groups) > 1 else torch.arange(len(group_ids))
        loss = whole if whole is not None and len(groups) == 1 else group_loss(trainer, outputs, inputs, rows)
        tally.add(name, group.reshape(1), loss.reshape(1), torch.tensor([float(len(rows))], device=group.device))


def pair_metrics(trainer: PairTrainer, outputs: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """TRL's metrics of each pair, [pairs], and `logps/chosen_shift`.

    That is how much likelier the chosen answer became than it is under the reference, in nats a token.
    """
    mask = inputs["completion_mask"]
    chosen, rejected = answer_log_probs(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)
    shift, other = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    return {
        "rewards/accuracies": (shift > other).float(),
        "rewards/margins": trainer.beta * (shift - other),
        "rewards/chosen": trainer.beta * shift,
        "rewards/rejected": trainer.beta * other,
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/chosen_shift": shift / mask.chunk(2)[0].sum(dim=1),
    }


def group_loss(trainer: PairTrainer, outputs: Any, inputs: dict[str, Any], rows: Tensor) -> Tensor:
    """`preference_loss` of some pairs of a batch, from log-probabilities already computed."""
    both = torch.cat([rows, rows + len(inputs["ref_chosen_logps"])])
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    of_rows = SimpleNamespace(**{name: getattr(outputs, name).detach()[both] for name in fields})
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = {n: v[rows] for n, v in inputs.items() if n.startswith("ref_")} | {n: inputs[n][both] for n in names}
    return preference_loss(trainer, lambda **_: of_rows, inputs)


def preference_loss(trainer: PairTrainer, model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """TRL's loss without its sft term: a mean over the pairs, except for the losses that sort them.

    TRL's figures are left aside, since the tally has them, by group and over all processes. `_compute_loss` asks its
    accelerator to gather what they are made of; here that is always 0, so that nothing waits for the device.
    """
    terms = [term for term in zip(trainer.loss_types, trainer.loss_weights, strict=True) if term[0] != SFT]
    nothing = torch.zeros(())
    view = SimpleNamespace(
        **{name: getattr(trainer, name) for name in SETTINGS},
        loss_types=[name for name, _ in terms],
        loss_weights=[weight for _, weight in terms],
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=trainer.accelerator.device, gather=lambda _: nothing, gather_for_metrics=lambda _: nothing
        ),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss: Tensor | float = DPOTrainer._compute_loss(view, model, inputs, False)
    return loss if isinstance(loss, Tensor) else torch.tensor(loss, device=trainer.accelerator.device)  # of no term


# What TRL's `_compute_loss` reads of its trainer, besides the terms of the loss.
SETTINGS = ("beta", "ld_alpha", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting",
            "precompute_ref_logps", "aux_loss_enabled", "args")  # fmt: skip


@torch.no_grad()
def score_pairs(trainer: PairTrainer, batch: Batch) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model's outputs on a batch of the collator, its inputs on the device, and what is ours of them."""
    inputs = send_to_device(batch, trainer.accelerator.device)
    own = {name: inputs.pop(name) for name in NON_MODEL_KEYS}
    asked = {name: value for name, value in inputs.items() if name != "completion_mask"}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**asked, labels=labels, fused_lm_head=True)
    return outputs, inputs, own


@torch.no_grad()
def evaluate_dpo(trainer: PairTrainer, batches: Iterable[CountedBatch], groups: Groups) -> dict[str, float]:
    """Loss and metrics over batches of pairs, whole and by group. `batches` as in `sft.evaluate_sft`.

    The loss is that of all pairs as one step: means over all pairs and all tokens of their chosen answers. A loss that
    sorts pairs is the mean over batches, weighted by their pairs.
    """
    tally = GroupedMetrics(trainer.track.tally.figures, groups, trainer.accelerator.device)
    for batch, counted in batches:
        outputs, inputs, own = score_pairs(trainer, batch)
        if counted:
            inputs |= trainer.reference_of(own["entries"])
            add_dpo_metrics(trainer, tally, outputs, inputs, own["group_ids"])
    return {f"eval_{name}": value for name, value in tally.means(trainer.sum_over_processes).items()}
