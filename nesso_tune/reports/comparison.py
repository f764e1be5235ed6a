"""Several runs compared. Runs that differ in their seed alone are one variant; the spread between seeds says whether a
difference between variants means anything.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.errors import RecipeError
from nesso_tune.logs import aligned
from nesso_tune.metric_registry import HEADLINE, METRICS, better_direction
from nesso_tune.recipes.yaml_source import read_document
from nesso_tune.reports.charts import chart_data, comparison_charts
from nesso_tune.reports.html import PLOTLY, render, write_page
from nesso_tune.reports.run_record import RunRecord, flattened, shown_value
from nesso_tune.runs.layout import FINAL, RECIPE
from nesso_tune.runs.metrics_log import stopped_by_callback

LEVEL = 0.05  # chance that some pair of equal variants is told apart
NOT_COMPARED = ("seed", "output_dir")
MAX_LABEL_LENGTH = 60  # of a variant that is named after its values
MAX_KEYS = 6  # that differ, on a terminal
MAX_LINES = 20  # of variants, and of their differences, on a terminal
_DIGEST = re.compile(r" #[0-9a-f]{16}\b")  # of a private value in a manifest, salted for each run
# Keys that can change the validation rows, or the tokens that the loss is a mean over.
_VALIDATION_KEYS = ("data.", "chat.", "model.base")


@dataclass(frozen=True)
class Sample:
    """The values of a metric over the seeds of a variant."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean; None without a value."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation; None with fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return ""
        return f"{self.mean:.5g}" + ("" if self.spread is None else f" ± {self.spread:.2g}")


@dataclass(frozen=True)
class ComparedRun:
    """A run of a comparison.

    Attributes:
        name: of its folder; its path where two have the same name.
        record: its files.
        left_out: why its values are in no mean; empty if they are.
    """

    name: str
    record: RunRecord
    left_out: str


@dataclass(frozen=True)
class Variant:
    """Runs whose recipes differ in their seed alone."""

    name: str
    runs: tuple[ComparedRun, ...]

    @property
    def counted(self) -> tuple[ComparedRun, ...]:
        """The runs that means are over."""
        return tuple(run for run in self.runs if not run.left_out)

    def sample(self, metric: str) -> Sample:
        """A metric for the weights in `final/` of each counted run."""
        values = [run.record.exported(metric) for run in self.counted]
        return Sample(tuple(value for value in values if value is not None))


@dataclass(frozen=True)
class Difference:
    """How much better one variant is than another, by Student's t-test of two means.

    Attributes:
        metric: which is compared.
        better, worse: names of the variants; of equal ones, the first is `better`.
        seeds: number of runs of each.
        amount: difference of the means, at least 0.
        stderr: its standard error, from the pooled standard deviation of both; None with one run each.
        p: probability of such a difference between equal variants; None likewise.
        pairs: number of pairs of variants among which this one was chosen.
    """

    metric: str
    better: str
    worse: str
    seeds: tuple[int, int]
    amount: float
    stderr: float | None
    p: float | None
    pairs: int

    @property
    def told_apart(self) -> bool:
        """Whether the difference is larger than the spread between seeds explains.

        `LEVEL` is divided by the number of pairs: the best of many equal variants is far from the worst by chance.
        """
        return self.p is not None and self.p * self.pairs < LEVEL

    def __str__(self) -> str:
        if self.stderr is None or self.p is None:
            if not self.amount:
                return f"{self.metric}: {self.better} and {self.worse} have the same value (one seed each)"
            return (
                f"{self.metric}: {self.better} is better than {self.worse} by {self.amount:.3g}; with one seed each "
                "the spread between seeds is not known, so this may be chance: train more seeds"
            )
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        seeds = " and ".join(f"{n} seed{'s' if n > 1 else ''}" for n in self.seeds)
        figures = f"{self.amount:.3g} ± {self.stderr:.2g} (standard error; {seeds}; {p})"
        if self.told_apart:
            return (
                f"{self.metric}: {self.better} is better than {self.worse} by {figures}: "
                "more than the spread between seeds explains"
            )
        return (
            f"{self.metric}: {self.better} and {self.worse} cannot be told apart: "
            f"they differ by {figures}, no more than the spread between seeds explains"
        )


@dataclass(frozen=True)
class Comparison:
    """Runs by variant.

    Attributes:
        metrics: what says which variant is better: a metric over all rows, then by language; empty if none is common.
        variants: in the order of the runs.
        differing: recipe keys that differ between variants.
        notes: what limits the comparison.
    """

    metrics: tuple[str, ...]
    variants: tuple[Variant, ...]
    differing: tuple[str, ...]
    notes: tuple[str, ...]

    @classmethod
    def read(cls, runs: Sequence[Path], metric: str | None = None) -> Comparison:
        """Compares runs.

        Args:
            runs: run directories.
            metric: says which variant is better; by default the headline metric of their method.

        Raises:
            RunEnvironmentError: if a folder is not a run directory.
        """
        records = {name: RunRecord.read(run) for name, run in zip(_short_names(runs), runs, strict=True)}
        groups: dict[str, dict[str, RunRecord]] = {}
        values = {name: _compared_values(record) for name, record in records.items()}
        for name, record in records.items():
            groups.setdefault(repr(sorted(values[name].items())), {})[name] = record
        firsts = [values[next(iter(group))] for group in groups.values()]
        keys = sorted({key for first in firsts for key in first})
        differing = tuple(key for key in keys if len({repr(first.get(key)) for first in firsts}) > 1)
        variants = tuple(_variant(group, differing) for group in groups.values())
        methods = {str(record.recipe.get("method", "sft")) for record in records.values()}
        notes = []
        if metric is None and len(methods) == 1:
            metric = HEADLINE.get(methods.pop())
        elif metric is None:
            notes.append("the runs have different methods, so no metric says which is better")
        if changed := [key for key in differing if key.startswith(_VALIDATION_KEYS)]:
            notes.append(f"the variants differ in {_listed(changed)}: their validation rows may not be the same")
        left_out = [f"{run.name} ({run.left_out})" for each in variants for run in each.runs if run.left_out]
        notes += [f"not in the means: {', '.join(left_out)}"] if left_out else []
        codes = {} if metric is None else dict.fromkeys(c for r in records.values() for c in r.languages(metric))
        metrics = () if metric is None else (metric, *(f"{metric}/{code}" for code in sorted(codes)))
        return cls(metrics, variants, differing, tuple(notes))

    def ranked(self, metric: str) -> list[Variant]:
        """The variants that have a metric, the best one first."""
        sign = 1 if better_direction(metric) == "lower" else -1
        known = [(mean, each) for each in self.variants if (mean := each.sample(metric).mean) is not None]
        return [each for _, each in sorted(known, key=lambda pair: sign * pair[0])]

    def differences(self, metric: str) -> list[Difference]:
        """The best variant beside each of the others."""
        ranked = self.ranked(metric)
        pairs = len(ranked) * (len(ranked) - 1) // 2
        return [difference(metric, ranked[0], other, pairs) for other in ranked[1:]]

    def verdicts(self) -> list[str]:
        """Which variant is better, over all rows, in a line for each difference, and what limits the comparison."""
        found = [str(each) for metric in self.metrics[:1] for each in self.differences(metric)]
        if self.metrics and len(self.variants) > 1 and not found:
            found = [f"{self.metrics[0]}: fewer than two variants have a finished run with it"]
        shown = found[: MAX_LINES if self.has_several_seeds else 1]
        more = [f"and {len(found) - len(shown)} more differences on the page"] if len(found) > len(shown) else []
        return [*shown, *more, *self.notes]

    def lines(self) -> list[str]:
        """The comparison as text: a table of the variants, the best one first, and the verdicts."""
        several = f"{len(self.variants)} variants" if len(self.variants) > 1 else "1 variant"
        differ = f"; they differ in {_listed(self.differing)}" if self.differing else ""
        number = sum(len(each.runs) for each in self.variants)
        head = f"{several}, {number} run{'s' if number > 1 else ''}{differ}"
        ranked = self.ranked(self.metrics[0]) if self.metrics else []
        shown = [*ranked, *(each for each in self.variants if each not in ranked)][:MAX_LINES]
        rows = [("variant", "seeds", *self.metrics)]
        rows += [(each.name, str(len(each.counted)), *(str(each.sample(m)) for m in self.metrics)) for each in shown]
        explained = (
            ["(mean ± standard deviation between seeds)"] if any(len(each.counted) > 1 for each in shown) else []
        )
        return [head, *aligned(rows), *explained, *self.verdicts()]

    @property
    def has_several_seeds(self) -> bool:
        """Whether a variant has more than one run."""
        return any(len(each.runs) > 1 for each in self.variants)


def difference(metric: str, better: Variant, worse: Variant, pairs: int = 1) -> Difference:
    """How much better a variant is than another one that has the metric too; see `Difference`."""
    a, b = better.sample(metric), worse.sample(metric)
    amount = abs((a.mean or 0.0) - (b.mean or 0.0))
    stderr = p = None
    freedom = len(a.values) + len(b.values) - 2
    if freedom > 0:
        squares = sum((sample.spread or 0.0) ** 2 * (len(sample.values) - 1) for sample in (a, b))
        stderr = math.sqrt(squares / freedom * (1 / len(a.values) + 1 / len(b.values)))
        p = two_sided_p(amount / stderr, freedom) if stderr else float(amount == 0)
    return Difference(metric, better.name, worse.name, (len(a.values), len(b.values)), amount, stderr, p, pairs)


def two_sided_p(t: float, freedom: int) -> float:
    """Probability that the absolute value of Student's t is at least `t`.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4: a finite sum for whole numbers of
    degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1 - inside)


def write_comparison(runs: Sequence[Path], output: Path, metric: str | None = None) -> Comparison:
    """Writes a page that compares several runs, and returns what it says.

    Args:
        runs: run directories.
        output: file of the page.
        metric: see `Comparison.read`.

    Raises:
        RunEnvironmentError: if a folder is not a run directory.
    """
    compared = Comparison.read(runs, metric)
    runs_in_order = [(i, j, run) for i, each in enumerate(compared.variants) for j, run in enumerate(each.runs)]
    lines = {run.name: run.record.lines for _, _, run in runs_in_order}
    looks = {run.name: (i, j) for i, j, run in runs_in_order}
    page = render(
        "comparison.html.j2",
        compared=compared,
        names=list(lines),
        differences=[
            (key, [shown_value(flattened(each.runs[0].record.recipe).get(key)) for each in compared.variants])
            for key in compared.differing
        ],
        best={metric: ranked[0].name for metric in compared.metrics if len(ranked := compared.ranked(metric)) > 1},
        seed_of=_seed,
        values=_values_at_the_end([run.record for _, _, run in runs_in_order]),
        chart_data=chart_data(comparison_charts(lines, looks)),
        plotly=PLOTLY,
    )
    write_page(page, output)
    return compared


def _variant(group: dict[str, RunRecord], differing: Sequence[str]) -> Variant:
    seeds: dict[str, str] = {}
    runs = []
    for name, record in group.items():
        left_out = "not finished"
        if (record.path / FINAL).is_dir():
            left_out = "ended early by a callback" if stopped_by_callback(record.lines) else ""
            left_out = left_out if record.measured else "no metrics"
        if not left_out and (first := seeds.setdefault(_seed(record), name)) != name:
            left_out = f"same seed as {first}"  # the same numbers again: they would make the spread too small
        runs.append(ComparedRun(name, record, left_out))
    return Variant(_variant_name(runs, differing), tuple(runs))


def _variant_name(runs: Sequence[ComparedRun], differing: Sequence[str]) -> str:
    """A run's own name, or the values that its seeds have in common."""
    if len(runs) == 1:
        return runs[0].name
    values = flattened(runs[0].record.recipe)
    short = [key.rsplit(".", 1)[-1] for key in differing]
    labels = [key if short.count(label) > 1 else label for key, label in zip(differing, short, strict=True)]
    name = ",".join(f"{label}={shown_value(values.get(key))}" for label, key in zip(labels, differing, strict=True))
    return name if 0 < len(name) <= MAX_LABEL_LENGTH else f"{runs[0].name} and {len(runs) - 1} more"


def _listed(keys: Sequence[str]) -> str:
    """Some keys, and the number of the others, which are on the page."""
    more = len(keys) - MAX_KEYS
    return ", ".join(keys[:MAX_KEYS]) + (f" and {more} more" if more > 0 else "")


def _seed(record: RunRecord) -> str:
    return shown_value(record.recipe.get("seed"))


def _compared_values(record: RunRecord) -> dict[str, Any]:
    """{key: value} of what variants differ in.

    A manifest has private values as digests, which differ between runs. Those of recipe.yaml replace them; they are
    never shown.
    """
    values = {key: value for key, value in flattened(record.recipe).items() if key not in NOT_COMPARED}
    private = [key for key, value in values.items() if _DIGEST.search(repr(value))]
    if private:
        own = _own_recipe(record.path / RECIPE)
        values |= {key: ("private", own[key]) for key in private if key in own}
    return values


def _own_recipe(file: Path) -> dict[str, Any]:
    try:
        return flattened(read_document(file).value)
    except (OSError, RecipeError):
        return {}


def _values_at_the_end(records: Sequence[RunRecord]) -> list[tuple[str, str, list[tuple[str, bool]]]]:
    """(metric, which direction is better, [(value, whether it is the best)]) of the metrics with a direction."""
    rows: list[tuple[str, str, list[tuple[str, bool]]]] = []
    for name in METRICS:
        values, direction = [record.exported(name) for record in records], better_direction(name)
        known = [value for value in values if value is not None]
        if direction is not None and known:
            best = min(known) if direction == "lower" else max(known)
            cells = [
                ("" if value is None else f"{value:.5g}", value == best and len(set(known)) > 1) for value in values
            ]
            rows.append((name, direction, cells))
    return rows


def _short_names(runs: Iterable[Path]) -> list[str]:
    """The names of the folders; whole paths where two have the same name."""
    named = [(run, run.resolve().name) for run in runs]
    names = [name for _, name in named]
    return [str(run) if names.count(name) > 1 else name for run, name in named]
