"""Curves of a run's metrics over its steps, as SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nesso_tune.publish.markup import shown

Line = Mapping[str, Any]
Points = list[tuple[float, float]]
WIDTH, HEIGHT, MARGIN = 420, 180, 40
COLOURS = ("#1b5e9b", "#2e8b57", "#b3541e", "#7a4fa3", "#555555")
DASHES = ("", "5 3", "2 2", "8 3 2 3")  # where there are more curves than colours
NAMES_IN_A_ROW, ROW = 2, 14  # of the legend


def plot(title: str, names: Sequence[str], lines: Sequence[Line]) -> str:
    """A figure of some metrics and their parts by language; empty if none was measured.

    Args:
        title: stands above it.
        names: of the metrics; `loss/source` stands for the parts of `loss` by source. Where there is none of held-out
            rows, that of training rows (`train_…`) is taken.
        lines: of metrics.jsonl.
    """
    series = _series(names, lines) or _series([f"train_{name}" for name in names], lines)
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(*ys, 0.0), max(*ys, 1e-12)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / max(max(xs) - min(xs), 1)
        return MARGIN + across * width, HEIGHT - MARGIN - (y - low) / (high - low) * height

    curves = [_curve(i, name, [place(x, y) for x, y in points]) for i, (name, points) in enumerate(series.items())]
    axes = (
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" stroke="#999"/>'
        f'<text x="2" y="{MARGIN + 4}" font-size="11">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - MARGIN}" font-size="11">{low:.3g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 14}" font-size="11" text-anchor="end">'
        f"step {max(xs):g}</text>"
    )
    tall = HEIGHT + ROW * ((len(series) - 1) // NAMES_IN_A_ROW)
    return (
        f"<figure><figcaption>{shown(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" role="img">{axes}{"".join(curves)}</svg></figure>'
    )


def _curve(number: int, name: str, points: Points) -> str:
    """A line, or a dot where there is one point alone, and its entry in the legend."""
    colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    stroke = f'stroke="{colour}" stroke-width="1.5"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
    drawn = f'<polyline points="{path}" fill="none" {stroke}/>'
    if len(points) == 1:
        (x, y) = points[0]
        drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'
    row, column = divmod(number, NAMES_IN_A_ROW)
    x, y = MARGIN + column * (WIDTH - MARGIN) // NAMES_IN_A_ROW, HEIGHT - 4 + row * ROW
    key = f'<path d="M{x},{y - 4} h16" {stroke}/><text x="{x + 20}" y="{y}" font-size="11" fill="{colour}">'
    return f"{drawn}{key}{shown(name)}</text>"


def _series(names: Sequence[str], lines: Sequence[Line]) -> dict[str, Points]:
    keys = sorted({key for line in lines for key in line if any(_belongs(key, name) for name in names)})
    found = {key: [(x, y) for x, y in _points(key, lines)] for key in keys}
    return {key: points for key, points in found.items() if points}


def _belongs(key: str, name: str) -> bool:
    """Whether a metric is the one of that name, or a part of it; a part by source only if the name says so."""
    part = key.removeprefix(f"{name}/")
    return key == name or (part != key and (name.endswith("/source") or not part.startswith("source/")))


def _points(key: str, lines: Sequence[Line]) -> Points:
    found = ((line["step"], line[key]) for line in lines if key in line)
    return [(float(x), float(y)) for x, y in found if isinstance(y, (int, float))]
