"""What is measured while a run trains: loss on the validation rows, and answers to prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from nesso_tune.data.packing import Rows
from nesso_tune.recipes.schema import EvaluationSection
from nesso_tune.training.answers import answer, measure
from nesso_tune.training.collate import Batch, CountedBatch
from nesso_tune.training.metrics import MetricsLog
from nesso_tune.training.prompts import Prompt, choose_prompts

LossOver = Callable[[Any, list[CountedBatch]], dict[str, float]]
SHOWN = 8  # answers that are written out at each evaluation


@dataclass
class Evaluator:
    """Measures a trainer's model. Called by the trainer at its intervals and at the end.

    Attributes:
        section: what to measure.
        rows: validation rows.
        train_rows: rows of epoch 0, for prompts that were trained on.
        collate: rows to a batch.
        micro_batch: rows of a batch.
        loss_over: the method's loss and metrics over batches.
        tokenizer: chat-ready.
        log: where the answers are written.
        total_steps: the step at which the training prompts are answered.
    """

    section: EvaluationSection
    rows: Rows
    train_rows: Rows
    collate: Callable[[list[dict[str, Any]]], Batch]
    micro_batch: int
    loss_over: LossOver
    tokenizer: PreTrainedTokenizerBase
    log: MetricsLog
    total_steps: int
    prompts: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        asked = self.rows if len(self.rows) else self.train_rows
        self.prompts = choose_prompts(asked, self.section.samples)

    def __call__(self, trainer: Any) -> dict[str, Any]:
        """Metrics by name, ready for a line of metrics.jsonl."""
        metrics: dict[str, Any] = self.loss_over(trainer, self._batches(trainer)) if len(self.rows) else {}
        prefix = "" if len(self.rows) else "train_"  # without held-out rows the prompts are those of training
        metrics |= self._answers(trainer, self.prompts, prefix, shown=True)
        if trainer.state.global_step == self.total_steps and self.section.train_samples:
            known = choose_prompts(self.train_rows, self.section.train_samples)
            metrics |= self._answers(trainer, known, "train_", shown=False)
        return metrics

    def _batches(self, trainer: Any) -> list[CountedBatch]:
        """This process's share of the validation rows, filled up to what the others have."""
        size = self.micro_batch
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = [(min(i + rank, len(batches) - 1), i + rank < len(batches)) for i in range(0, len(batches), world)]
        return [(self.collate([self.rows[row] for row in batches[i]]), counted) for i, counted in mine]

    def _answers(self, trainer: Any, prompts: list[Prompt], prefix: str, shown: bool) -> dict[str, float]:
        if not prompts:
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        autocast = trainer.compute_loss_context_manager()
        answers = answer(model, self.tokenizer, prompts, self.section.max_new_tokens, autocast)
        for one in answers[:SHOWN] if shown else []:
            question = self.tokenizer.decode(one.prompt.ids, skip_special_tokens=True)
            line = {"language": one.prompt.language, "prompt": question, "answer": one.text}
            self.log.write(
                {"step": trainer.state.global_step, "event": "answer", **line, "expected": one.expected,
                 "stopped": one.stopped}
            )  # fmt: skip
        return measure(answers, prefix)
