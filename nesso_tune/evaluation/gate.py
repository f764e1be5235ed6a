"""The gate: whether a model is worse than its parent, by a paired bootstrap over prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isnan
from statistics import NormalDist
from typing import Annotated

import numpy as np
from pydantic import Field

from nesso_tune.errors import DataError, GateRefused, Problem, RecipeError, closest
from nesso_tune.evaluation.results import KNOWN, Metric, ModelResult
from nesso_tune.evaluation.suites import Suite, load_suite
from nesso_tune.evaluation.table import stderr_of_difference
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import Count, NonEmpty, Section

RESAMPLES = 4000
POWER = 0.8  # of the smallest drop that the verdict table states
PRECISION = 1e-4  # of that drop
UNKNOWN = "-"  # in its column
DEFAULT_GATE = "default"


class Tolerance(Section):
    """What a gate tolerates in one metric."""

    max_drop: float = Field(ge=0)
    """Largest tolerated drop, in the unit of the metric. For a metric where lower is better, the largest rise."""


class Gate(Section):
    """The metrics that must not get worse, and the confidence of the decision."""

    title: NonEmpty
    """One line that says what the gate protects."""
    suites: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)]
    """Suites that are run: names or files."""
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    """A model without any true drop beyond the tolerance is refused with a probability of at most 1 - confidence. It is
    divided over the metrics (Bonferroni)."""
    resamples: Count = RESAMPLES
    """Number of bootstrap resamples."""
    seed: int = 0
    """Seed of the resamples."""
    metrics: Annotated[dict[NonEmpty, Tolerance], Field(min_length=1)]
    """Tolerance of each metric, by its name in results: task/metric."""

    @property
    def level(self) -> float:
        """Probability of a wrong refusal for each metric."""
        return (1 - self.confidence) / len(self.metrics)


@dataclass(frozen=True)
class Verdict:
    """The decision about one metric.

    Attributes:
        metric: its name.
        parent: value of the parent, over the common prompts.
        model: value of the model, over the common prompts.
        drop: in the worse direction.
        least_drop: lower confidence bound of the drop.
        max_drop: the tolerance.
        detectable: the smallest true drop that would be refused with a probability of 80 %; NaN if it is unknown.
        prompts: number of common prompts.
        refused: whether `least_drop` exceeds `max_drop`, or the model has no value.
        parent_prompts: number of prompts with a value of the parent; those without one of the model are left out.
        confidence: of `least_drop`, over all metrics of the gate.
    """

    metric: str
    parent: float
    model: float
    drop: float
    least_drop: float
    max_drop: float
    detectable: float
    prompts: int
    refused: bool
    parent_prompts: int = 0
    confidence: float = 0.95

    @property
    def reason(self) -> str:
        """Why the metric is refused or passes."""
        if not self.prompts:
            return "the model has no value" if self.refused else "not compared: the parent has no value to lose"
        at_least = f"{percent(self.confidence)} confident of a drop of at least {self.least_drop:.3f}"
        if self.refused:
            return f"{at_least}, {self.max_drop:g} is tolerated"
        if self.drop > self.max_drop:
            return f"the drop may be chance: {at_least}"
        return "within the tolerance"

    @property
    def compared(self) -> str:
        """Number of compared prompts, and of how many if the model has no value for some."""
        return f"{self.prompts} of {self.parent_prompts}" if self.prompts < self.parent_prompts else str(self.prompts)


def percent(share: float) -> str:
    """A share in percent: `95 %`."""
    return f"{100 * share:g} %"


def load_gate(name: str) -> tuple[Gate, dict[str, Suite]]:
    """Loads a shipped gate by name (`default`), or a gate file, and its suites.

    Raises:
        RecipeError: if it does not exist or is invalid, or a metric is in none of its suites.
    """
    gate, document = read_spec(find_spec("gates", flag_path(name), "gate"), Gate)
    suites = {suite: load_suite(suite) for suite in gate.suites}
    known = [metric for suite in suites.values() for metric in suite.metric_names]
    problems = []
    for metric in gate.metrics:
        if metric not in known:
            near = closest(metric, known)
            remedy = f"did you mean `{near}`?" if near else f"use one of {', '.join(known)}"
            where = document.where(("metrics", metric))
            problems.append(Problem(where, f"no suite of the gate has the metric `{metric}`", remedy))
    if problems:
        raise RecipeError(problems)
    return gate, suites


def decide(gate: Gate, model: Mapping[str, Metric], parent: Mapping[str, Metric]) -> list[Verdict]:
    """The verdict on every metric of a gate.

    Prompts that the parent does not know (metric `known` of the task) are left out: its answers to them are chance, and
    so is any difference from them.

    Raises:
        RecipeError: if a metric has no better direction, or no scores of single prompts.
        DataError: if the parent knows none of the prompts.
    """
    verdicts = []
    for name, tolerance in gate.metrics.items():
        own, before = model.get(name), parent.get(name)
        _check_comparable(name, own, before)
        if before is not None:
            known = before.restricted_to(_known_prompts(name, parent))
            own = own and own.restricted_to(known.prompts if known else ())
            before = known
        verdicts.append(_compare(name, own, before, tolerance.max_drop, gate))
    if any(name in parent for name in gate.metrics) and not any(v.prompts or v.refused for v in verdicts):
        what = "the parent knows none of the prompts (it finds the reference answers as unlikely as by guessing)"
        raise DataError("gate", what, "name prompts that it was trained for, e.g. --data chat=FILE")
    return verdicts


def decide_all(gate: Gate, results: Mapping[str, Sequence[ModelResult]], parent: str) -> dict[str, list[Verdict]]:
    """The verdicts on each model but the parent.

    Args:
        gate: the gate.
        results: of every model on each suite of the gate.
        parent: name of the parent.

    Raises:
        RecipeError, DataError: as `decide`.
    """
    metrics: dict[str, dict[str, Metric]] = {}
    for each in results.values():
        for result in each:
            metrics.setdefault(result.model, {}).update(result.metrics)
    return {model: decide(gate, own, metrics[parent]) for model, own in metrics.items() if model != parent}


def _known_prompts(metric: str, parent: Mapping[str, Metric]) -> frozenset[int]:
    """Prompts of a metric without those that the parent does not know."""
    known = parent.get(f"{metric.partition('/')[0]}/{KNOWN}")
    unknown = {p for p, score in zip(known.prompts, known.scores, strict=True) if not score} if known else set()
    return frozenset(parent[metric].prompts) - unknown


def _check_comparable(name: str, *metrics: Metric | None) -> None:
    for metric in metrics:
        if metric is not None and metric.better is None:
            raise RecipeError(f"gate metric {name}", "has no better direction", "remove it from the gate")
        if metric is not None and not metric.scores:
            raise RecipeError(f"gate metric {name}", "has no scores of single prompts", "remove it from the gate")


def _compare(name: str, model: Metric | None, parent: Metric | None, max_drop: float, gate: Gate) -> Verdict:
    known = 0 if parent is None else len(parent.scores)
    if model is None or parent is None or not set(model.prompts) & set(parent.prompts):
        absent = (float("nan"),) * 4
        return Verdict(name, *absent, max_drop, absent[0], 0, parent is not None, known, gate.confidence)
    model, parent = common_prompts(model, parent)
    sign = 1 if parent.better == "higher" else -1
    drop = sign * (parent.value - model.value) + 0.0  # no negative zero
    drops = sign * (np.array(parent.scores) - np.array(model.scores))
    weights = np.array(model.weights) if model.weights else np.ones(len(drops))
    resampling = gate.level, gate.resamples, gate.seed
    least = _lower_bound(drops, weights, *resampling)
    if {*model.scores, *parent.scores} <= {0.0, 1.0} and np.all(weights == 1):
        detectable = _detectable_share(len(drops), int((drops < 0).sum()), max_drop, *resampling)
    else:
        detectable = _detectable_mean(stderr_of_difference(model, parent), max_drop, gate.level)
    return Verdict(
        name, parent.value, model.value, drop, least, max_drop, detectable, len(drops), least > max_drop, known,
        gate.confidence,
    )  # fmt: skip


def _detectable_mean(error: float | None, max_drop: float, level: float) -> float:
    """The drop of a mean that is refused with probability `POWER`, if the difference has this standard error."""
    if not error:  # all differences are equal, which says nothing about those of another model
        return float("nan")
    quantile = NormalDist().inv_cdf
    return max_drop + (quantile(1 - level) + quantile(POWER)) * error


@lru_cache(maxsize=256)  # it depends on little, and takes as long as all else
def _detectable_share(n: int, better: int, max_drop: float, level: float, resamples: int, seed: int) -> float:
    """The drop of a share of prompts that is refused with probability `POWER`.

    A true drop d is that a prompt gets worse with probability d + b and better with b, by chance: b is the share of
    prompts that got better here. The observed errors are not used: without differences they are 0, and those of a worse
    model are not.

    Args:
        n: number of prompts.
        better: number of those that got better.
        max_drop: the tolerance.
        level, resamples, seed: of the gate.
    """
    chance = better / n

    def is_refused(worse: int) -> bool:
        changed = np.repeat([1.0, 0.0, -1.0], [worse, n - worse - better, better])
        return _lower_bound(changed, np.ones(n), level, resamples, seed) > max_drop

    worse = bisect_left(range(n - better + 1), True, key=is_refused)  # fewest that are refused
    least_net = worse - better

    def power(drop: float) -> float:
        """Probability that worse prompts - better prompts is at least `least_net`."""
        one = np.zeros(2 * n + 1)  # of a single prompt; that of n prompts is its n-fold convolution
        one[:3] = chance, 1 - drop - 2 * chance, drop + chance
        return float(np.fft.ifft(np.fft.fft(one) ** n).real[n + least_net :].sum())

    low, high = 0.0, 1 - 2 * chance
    if worse > n - better or power(high) < POWER:
        return float("nan")
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def common_prompts(a: Metric, b: Metric) -> tuple[Metric, Metric]:
    """Two metrics over the prompts that have scores in both; there is at least one."""
    shared = frozenset(a.prompts) & frozenset(b.prompts)
    first, second = (metric.restricted_to(shared) for metric in (a, b))
    assert first is not None
    assert second is not None
    return first, second


def _lower_bound(drops: np.ndarray, weights: np.ndarray, level: float, resamples: int, seed: int) -> float:
    """Lower confidence bound of the drop: a quantile of its means over resampled prompts (Efron, 1979).

    Both models are resampled together, so prompts that are hard for both do not count as noise.

    Args:
        drops: of each prompt, in the worse direction.
        weights: of each prompt.
        level, resamples, seed: of the gate.
    """
    return float(np.quantile(bootstrap_means(drops[None], weights, resamples, seed)[0], level))


def bootstrap_means(scores: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Weighted means over resampled prompts.

    Args:
        scores: [sets, prompts]; all sets get the same resamples.
        weights: of the prompts, [prompts].
        resamples: number of resamples.
        seed: of the resamples.

    Returns:
        [sets, resamples].
    """
    counts = _resampled_counts(scores.shape[1], resamples, seed)
    if np.any(weights != 1):
        counts = counts * weights
    means: np.ndarray = scores @ counts.T / counts.sum(axis=1)
    return means


@lru_cache(maxsize=4)  # the metrics of a task share the prompts
def _resampled_counts(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """How often each prompt is in each resample, [resamples, prompts]."""
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return counts.astype(float)


def verdict_lines(gate: Gate, verdicts: Sequence[Verdict]) -> list[str]:
    """The verdict table, and what its figures mean."""
    header = ["", "parent", "model", "drop", "at least", "tolerated", "80 % power", "prompts", "verdict"]
    rows = [header] + [
        [
            v.metric, *(f"{value:.3f}" for value in (v.parent, v.model, v.drop, v.least_drop)), f"{v.max_drop:g}",
            UNKNOWN if isnan(v.detectable) else f"{v.detectable:.3f}", v.compared,
            f"{'REFUSED' if v.refused else 'passed'}: {v.reason}",
        ]
        for v in verdicts
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]])
        for row in rows
    ]
    return [
        *lines,
        "",
        f"drop: in the worse direction; at least: its lower confidence bound ({percent(gate.confidence)} over all "
        f"metrics); 80 % power: the true drop that is refused in 80 % of cases ({UNKNOWN}: unknown); "
        "prompts: those compared, of those with a value of the parent",
    ]


def refusal(
    model: str,
    parent: str,
    verdicts: Sequence[Verdict],
    remedy: str = "train another way, or raise max_drop in the gate if the loss is acceptable",
) -> GateRefused | None:
    """The error of a refused model, with a problem for each refused metric; None if it passes."""
    problems = [
        Problem(model, f"{v.metric} is {v.model:.3f}, and {v.parent:.3f} in {parent}: {v.reason}", remedy)
        for v in verdicts if v.refused
    ]  # fmt: skip
    return GateRefused(problems) if problems else None
