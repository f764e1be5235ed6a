"""What is measured while a run trains: loss on the validation rows, and answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from nesso_tune.data.packing import Rows
from nesso_tune.recipes.schema import EvaluationSection
from nesso_tune.training.answers import Answer, answer, length_ratios, measure
from nesso_tune.training.collate import Collator, CountedBatch
from nesso_tune.training.metrics import MetricsLog, read_metrics
from nesso_tune.training.processes import from_first
from nesso_tune.training.prompts import Prompt, choose_prompts
from nesso_tune.training.tally import Groups

LossOver = Callable[[Any, list[CountedBatch], Groups], dict[str, float]]
SHOWN = 8  # answers that are written out at each evaluation
PARENT = "parent"  # the event of the line with the figures of the parent's answers


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
        sources: names of the sources that `rows` come from (`train_rows`, where nothing is held out), for the figures
            by source; none if empty.
        parent: figures of the parent's answers to the same prompts, in DPO; see `meet_parent`.
    """

    section: EvaluationSection
    rows: Rows
    train_rows: Rows
    collate: Collator
    micro_batch: int
    loss_over: LossOver
    tokenizer: PreTrainedTokenizerBase
    log: MetricsLog
    total_steps: int
    sources: tuple[str, ...] = ()
    parent: Mapping[str, float] = field(default_factory=dict)
    prompts: list[Prompt] = field(init=False)

    def __post_init__(self) -> None:
        asked = self.rows if len(self.rows) else self.train_rows
        self.prompts = choose_prompts(asked, self.section.samples)

    def __call__(self, trainer: Any) -> dict[str, Any]:
        """Metrics by name, ready for a line of metrics.jsonl."""
        metrics: dict[str, Any] = {}
        if len(self.rows):
            metrics |= self.loss_over(trainer, self._batches(trainer), self.collate.groups)
        prefix = "" if len(self.rows) else "train_"  # without held-out rows the prompts are those of training
        answers = self._answers(trainer, self.prompts)
        self._show([one for one in answers if not one.prompt.private][:SHOWN], trainer.state.global_step)
        metrics |= measure(answers, prefix, self.sources)
        metrics |= length_ratios(metrics, self.parent, prefix)
        if trainer.state.global_step == self.total_steps and self.section.train_samples:
            known = choose_prompts(self.train_rows, self.section.train_samples)
            same = self.train_rows.documents is self.rows.documents or not len(self.rows)
            metrics |= measure(self._answers(trainer, known), "train_", self.sources if same else ())
        return metrics

    def meet_parent(self, trainer: Any, begins: bool) -> None:
        """Takes the figures of the parent, the model that training starts from; all processes call this.

        Where a run begins the parent is asked, and a line of metrics.jsonl keeps the figures; later they are read back.
        If other prompts were asked then, or other lengths allowed, there are none.
        """
        if begins:
            self._ask_parent(trainer)
        self.parent = from_first(self._noted() if trainer.is_world_process_zero() else {})

    def _ask_parent(self, trainer: Any) -> None:
        was_training = trainer.model.training
        trainer.model.eval()
        answers = self._answers(trainer, self.prompts)
        trainer.model.train(was_training)
        if answers:
            allowed = {"max_new_tokens": self.section.max_new_tokens}
            self.log.write({"step": 0, "event": PARENT, **allowed, **measure(answers, sources=self.sources)})

    def _noted(self) -> dict[str, Any]:
        asked = {"event": PARENT, "answers": len(self.prompts), "max_new_tokens": self.section.max_new_tokens}
        lines = read_metrics(self.log.path) if self.log.path.exists() else []
        return next((line for line in lines if asked.items() <= line.items()), {})

    def _batches(self, trainer: Any) -> list[CountedBatch]:
        """This process's share of the validation rows, filled up to what the others have."""
        size = self.micro_batch
        batches = [list(range(i, min(i + size, len(self.rows)))) for i in range(0, len(self.rows), size)]
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = [(min(i + rank, len(batches) - 1), i + rank < len(batches)) for i in range(0, len(batches), world)]
        return [(self.collate([self.rows[row] for row in batches[i]]), counted) for i, counted in mine]

    def _answers(self, trainer: Any, prompts: list[Prompt]) -> list[Answer]:
        if not prompts:
            return []
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        autocast = trainer.compute_loss_context_manager()
        return answer(model, self.tokenizer, prompts, self.section.max_new_tokens, autocast)

    def _show(self, answers: list[Answer], step: int) -> None:
        """Writes answers to prompts that may be shown out, a line of metrics.jsonl each."""
        for one in answers:
            question = self.tokenizer.decode(one.prompt.ids, skip_special_tokens=True)
            line = {"language": one.prompt.language, "prompt": question, "answer": one.text}
            line |= {"expected": one.expected, "stopped": one.stopped}
            self.log.write({"step": step, "event": "answer", **line})
