"""Results of tasks: metrics with standard errors, the scores of single prompts, and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nesso_tune.metric_registry import Better

KNOWN = "known"  # metric of a task: the prompts whose reference answer the model knows (`evaluation/chat.py`)


@dataclass(frozen=True)
class Metric:
    """A mean over prompts.

    Attributes:
        value: the mean.
        stderr: its standard error; None for a single prompt.
        scores: the score of each prompt, [prompts]; empty if the metric is no mean of scores.
        weights: weight of each prompt, [prompts]; empty if all are equal.
        prompts: index of each score's prompt in the task, [prompts]: it pairs the scores of two models.
        better: which direction is better; None if neither is.
    """

    value: float
    stderr: float | None = None
    scores: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    prompts: tuple[int, ...] = ()
    better: Better | None = "higher"

    def restricted_to(self, prompts: Collection[int]) -> Metric | None:
        """The same metric over some of its prompts, in ascending order; None if it has none of them."""
        weights = self.weights or [1.0] * len(self.scores)
        kept = sorted(
            (prompt, score, weight)
            for prompt, score, weight in zip(self.prompts, self.scores, weights, strict=True)
            if prompt in prompts
        )
        if not kept:
            return None
        own, scores, weights = zip(*kept, strict=True)
        return mean_of(scores, own, weights if self.weights else (), self.better)


@dataclass(frozen=True)
class AnsweredPrompt:
    """An answer of a model, with what is needed to show it.

    Attributes:
        id: of the prompt.
        language: code of the prompt's language.
        prompt: the last user turn.
        text: the answer.
        stopped: whether it ends with the end token.
        passed: the verdict, for tasks that have one for each answer.
    """

    id: str
    language: str
    prompt: str
    text: str
    stopped: bool
    passed: bool | None = None


@dataclass(frozen=True)
class TaskResult:
    """Metrics of one model on one task, and its answers if the task is ours."""

    metrics: Mapping[str, Metric]
    answers: tuple[AnsweredPrompt, ...] = ()

    def to_json(self) -> str:
        """JSON text; floats keep all their digits."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> TaskResult:
        """Inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        metrics = {
            name: Metric(
                m["value"], m["stderr"], tuple(m["scores"]), tuple(m["weights"]), tuple(m["prompts"]), m["better"]
            )
            for name, m in raw["metrics"].items()
        }
        return cls(metrics, tuple(AnsweredPrompt(**answer) for answer in raw["answers"]))


@dataclass(frozen=True, repr=False)
class ModelResult:
    """Metrics of one model on a suite, named `task/metric`.

    Attributes:
        model: as the user named it.
        tasks: result of each task.
        computed: tasks that were computed now; the others come from the cache.
    """

    model: str
    tasks: Mapping[str, TaskResult]
    computed: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {metric.value:.4g}" for name, metric in self.metrics.items() if name.count("/") == 1)
        return f"ModelResult({self.model!r}, {shown})"

    @property
    def metrics(self) -> dict[str, Metric]:
        """All metrics, also those that the suite does not list."""
        return {
            f"{task}/{name}": metric for task, result in self.tasks.items() for name, metric in result.metrics.items()
        }


def mean_of(
    scores: Sequence[float], prompts: Sequence[int], weights: Sequence[float] = (), better: Better | None = "higher"
) -> Metric:
    """The (weighted) mean of scores with its standard error.

    The standard error is that of a mean of independent prompts: sample standard deviation / sqrt(n). With weights it is
    that of a ratio of means (linearised), which equals the former if all weights are equal.
    """
    w = list(weights) or [1.0] * len(scores)
    total = math.fsum(w)
    value = math.fsum(score * weight for score, weight in zip(scores, w, strict=True)) / total
    n, stderr = len(scores), None
    if n > 1:
        squares = math.fsum((weight * (score - value)) ** 2 for score, weight in zip(scores, w, strict=True))
        stderr = math.sqrt(squares * n / (n - 1)) / total
    return Metric(value, stderr, tuple(map(float, scores)), tuple(map(float, weights)), tuple(prompts), better)


def means_by_group(
    name: str,
    scores: Iterable[float | bool | None],
    groups: Sequence[Callable[[int], str | None]] = (),
    better: Better | None = "higher",
) -> dict[str, Metric]:
    """`name`, the mean over all scores, and `name/GROUP`, the mean over each group's scores.

    Args:
        name: of the metric.
        scores: of each prompt; None where the score is undefined.
        groups: functions from the index of a prompt to its group, or to None.
        better: which direction is better.
    """
    members: dict[str, list[tuple[int, float]]] = {}
    for i, score in enumerate(scores):
        if score is None:
            continue
        for key in [name, *(f"{name}/{group}" for of in groups if (group := of(i)) is not None)]:
            members.setdefault(key, []).append((i, float(score)))
    return {key: mean_of([s for _, s in pairs], [i for i, _ in pairs], (), better) for key, pairs in members.items()}
