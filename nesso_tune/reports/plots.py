"""Geometry of the SVG histograms of row lengths in the data report; `templates/length_histogram.html.j2` draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import Any

HISTOGRAM_WIDTH, TOP, FLOOR, LEFT, RIGHT_MARGIN = 440, 52, 188, 52, 68
MAX_TICKS = 10


@dataclass(frozen=True)
class Label:
    """SVG text."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    style: str = ""


@dataclass(frozen=True)
class Bar:
    """SVG rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class MarkerLine:
    """Vertical line from `top` to the x axis."""

    x: float
    top: int
    style: str


@dataclass(frozen=True)
class LengthHistogram:
    """Token lengths of one language, with quantiles and `sequence_len` marked.

    Attributes:
        summary: the quantiles in a sentence.
        description: text alternative of the drawing.
    """

    language: str
    summary: str
    description: str
    bars: tuple[Bar, ...]
    ticks: tuple[Label, ...]
    lines: tuple[MarkerLine, ...]
    labels: tuple[Label, ...]
    width: int = HISTOGRAM_WIDTH
    height: int = FLOOR + 22
    left: int = LEFT
    right: int = HISTOGRAM_WIDTH - RIGHT_MARGIN
    floor: int = FLOOR


def length_histograms(lengths: Mapping[str, Any], sequence_len: int) -> list[LengthHistogram]:
    """One histogram per language, all over the same x axis.

    Args:
        lengths: `lengths` of the data report; bin i counts lengths from 2**i to 2**(i + 1) - 1.
        sequence_len: the limit to mark.
    """
    edges, languages = lengths["edges"], lengths["languages"]
    occupied = [i for stats in languages.values() for i, n in enumerate(stats["counts"]) if n]
    bins = range(min(*occupied, floor(log2(sequence_len))), max(len(edges) - 1, ceil(log2(sequence_len))))
    return [_length_histogram(language, stats, sequence_len, bins) for language, stats in languages.items()]


def _length_histogram(language: str, stats: Mapping[str, Any], sequence_len: int, bins: range) -> LengthHistogram:
    counts = {i: stats["counts"][i] if i < len(stats["counts"]) else 0 for i in bins}
    step, peak = (HISTOGRAM_WIDTH - LEFT - RIGHT_MARGIN) / len(bins), max(*counts.values(), 1)
    bars, bar_labels = [], []
    for i, n in counts.items():
        height, x = n / peak * (FLOOR - TOP - 16), LEFT + (i - bins.start) * step
        if n:
            bars.append(Bar(x + 1, FLOOR - height, step - 2, height))
            bar_labels.append(Label(x + step / 2, FLOOR - height - 4, _compact(n)))
    ticks = tuple(
        Label(LEFT + i * step, FLOOR + 16, _compact(2 ** (bins.start + i), 1024))
        for i in range(0, len(bins) + 1, ceil(len(bins) / MAX_TICKS))
    )
    lines, labels = _markers(stats, sequence_len, lambda tokens: LEFT + (log2(max(1, tokens)) - bins.start) * step)
    summary = (
        f"median {stats['p50']:,} tokens, 95th percentile {stats['p95']:,}, "
        f"maximum {stats['max']:,}, mean {stats['mean']:,.0f}"
    )
    bin_counts = "; ".join(f"{2**i:,} to {2 ** (i + 1) - 1:,} tokens: {n:,} rows" for i, n in counts.items() if n)
    description = f"Row lengths in {language}: {summary}; sequence_len is {sequence_len:,}. {bin_counts}"
    return LengthHistogram(language, summary, description, tuple(bars), ticks, lines, (*labels, *bar_labels))


def _markers(
    stats: Mapping[str, Any], sequence_len: int, x_of: Callable[[int], float]
) -> tuple[tuple[MarkerLine, ...], tuple[Label, ...]]:
    """Lines at the quantiles and at `sequence_len`; labels are staggered so that neighbours do not overlap."""
    lines, labels = [], []
    for name, y, anchor, dx in (("p95", 28, "middle", 0), ("p50", 42, "end", -4), ("max", 42, "start", 4)):
        x = x_of(stats[name])
        lines.append(MarkerLine(x, y + 4, "at"))
        labels.append(Label(x + dx, y, f"{name} {stats[name]:,}", anchor, "mark"))
    x = x_of(sequence_len)
    lines.append(MarkerLine(x, 18, "limit"))
    right_edge = HISTOGRAM_WIDTH - RIGHT_MARGIN + 20
    labels.append(Label(min(x, right_edge), 12, f"sequence_len {sequence_len:,}", "middle", "mark far"))
    return tuple(lines), tuple(labels)


def _compact(number: int, thousand: int = 1000) -> str:
    """A number with three significant digits and a k or M suffix."""
    for unit, suffix in ((thousand**2, "M"), (thousand, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{suffix}"
    return str(number)
