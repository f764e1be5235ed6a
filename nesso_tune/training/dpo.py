"""Preference training on TRL's DPOTrainer, with the reference's log-probabilities computed once."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from nesso_tune.errors import NumericalError
from nesso_tune.training.collate import CountedBatch
from nesso_tune.training.sharding import drops_at_random
from nesso_tune.training.tally import Tally
from nesso_tune.training.trainer import TrackedTrainer

METRICS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
           "logps/rejected")  # fmt: skip
NAMES = ("loss", *METRICS)
NOT_FOR_TRL = ("language_ids", "entries", "tokens")  # columns of our collator
Reference = dict[int, tuple[float, float]]  # pair -> log-probability of its chosen and rejected answer


class PairTrainer(TrackedTrainer, DPOTrainer):
    """Loss and metrics are TRL's, a mean over pairs. `reference` is set before the first step."""

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

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        extra = {name: inputs.pop(name) for name in NOT_FOR_TRL}
        inputs |= self.reference_of(extra["entries"])
        seen: list[Any] = []

        def recorded(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        loss = super()._compute_loss(recorded, inputs, return_outputs)
        track = self.track
        if self.state.global_step == 0:
            self._assert_policy_is_reference(seen[0].log_probs, inputs)
        add_pair_losses(self, track.tally, seen[0], inputs, extra["language_ids"])
        track.tokens += int(extra["tokens"])
        track.supervised_tokens += int(inputs["completion_mask"].sum())
        self._metrics["train"].clear()  # the tally has them, by language and over all processes
        return loss

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
                "remove reference.safetensors from the run directory and start anew with --overwrite",
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


def add_pair_losses(
    trainer: PairTrainer, tally: Tally, outputs: Any, inputs: dict[str, Any], language_ids: Tensor
) -> None:
    """Adds TRL's own loss and metrics of each language's pairs to a tally, from log-probabilities already computed."""
    pairs = len(language_ids)
    for language in language_ids.unique():
        rows = (language_ids == language).nonzero().flatten()
        both = torch.cat([rows, rows + pairs])
        values = pair_metrics(trainer, outputs, inputs, rows, both)
        where, weight = language.reshape(1), torch.tensor([float(len(rows))], device=rows.device)
        for name, value in values.items():
            tally.add(name, where, torch.as_tensor(value, device=rows.device).reshape(1), weight)


@torch.no_grad()
def pair_metrics(
    trainer: PairTrainer, outputs: Any, inputs: dict[str, Any], rows: Tensor, both: Tensor
) -> dict[str, float | Tensor]:
    """TRL's loss and metrics for some pairs of a batch.

    `_compute_loss` asks its model for per-token fields and its accelerator to gather; here both answer with what is
    at hand, so that the numbers are TRL's without another forward pass or any communication.
    """
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    sub_outputs = SimpleNamespace(**{name: getattr(outputs, name).detach()[both] for name in fields})
    sub_inputs = {n: v[rows] if n.startswith("ref_") else v[both] for n, v in inputs.items() if n != "use_cache"}
    found: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    view = SimpleNamespace(
        **{name: getattr(trainer, name) for name in SETTINGS},
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=both.device, gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=found,
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(view, lambda **_: sub_outputs, sub_inputs, False)
    return {"loss": loss, **{name: found["train"][name][0] for name in METRICS}}


# What TRL's `_compute_loss` reads of its trainer.
SETTINGS = ("beta", "loss_types", "loss_weights", "ld_alpha", "label_smoothing", "f_divergence_type",
            "f_alpha_divergence_coef", "use_weighting", "precompute_ref_logps", "aux_loss_enabled", "args")  # fmt: skip


@torch.no_grad()
def evaluate_pairs(trainer: PairTrainer, batches: list[CountedBatch]) -> dict[str, float]:
    """Loss and metrics over batches of pairs, whole and by language. `batches` as in `sft.evaluate_loss`."""
    tally = Tally(NAMES, trainer.track.tally.languages, trainer.accelerator.device)
    for batch, counted in batches:
        inputs = trainer._prepare_inputs(dict(batch))
        extra = {name: inputs.pop(name) for name in NOT_FOR_TRL}
        inputs |= trainer.reference_of(extra["entries"])
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with trainer.compute_loss_context_manager():
            outputs = trainer.model_wrapped(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels,
                fused_lm_head=True,
            )  # fmt: skip
        if counted:
            add_pair_losses(trainer, tally, outputs, inputs, extra["language_ids"])
    return {f"eval_{name}": value for name, value in tally.means(trainer.sum_over_processes).items()}
