"""Curves of a run's metrics over its steps, as SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.data.privacy import Privacy
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe, as_yaml
from nesso_tune.reports.html import shown
from nesso_tune.runs.metrics_log import read_metrics
from nesso_tune.training.alarms import alarm_events

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


PLOTS = {  # title: the metrics drawn in it, with their parts by language
    "Loss": ("loss",),
    "Loss by source": ("loss/source",),
    "Loss on held-out rows": ("eval_loss",),
    "Loss on held-out rows by source": ("eval_loss/source",),
    "Answers that end by themselves": ("stop_rate",),
    "Answers equal to the data's": ("exact_match",),
    "Answers in the language of their prompt": ("language_fidelity",),
    "Answers that end in a loop": ("repetition_rate",),
    "Tokens of an answer": ("answer_tokens",),
    "Preference: length of the answers, by the parent's": ("answer_length_ratio",),
    "Preference: chosen answers against the reference, nats a token": ("logps/chosen_shift", "eval_logps/chosen_shift"),
    "Preference: accuracy on held-out pairs": ("eval_rewards/accuracies",),
    "Preference: margin on held-out pairs": ("eval_rewards/margins",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 920px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem } figure { margin: 0; max-width: 100% }
svg { max-width: 100%; height: auto } figcaption { font-weight: 600 }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
th, .alarms td { overflow-wrap: normal }
"""


def write_report(run: Path, recipe: Recipe, plan: Plan, data: Mapping[str, Any]) -> Path:
    """Writes report.html into a run directory, from its metrics.jsonl; private sources are not named."""
    lines = read_metrics(run / "metrics.jsonl")
    plots = [svg for title, names in PLOTS.items() if (svg := plot(title, names, lines))]
    alarms = _rows(alarm_events(lines), ("step", "alarm", "said"))
    answers = [line for line in lines if line.get("event") == "answer"]
    last = [line for line in answers if line["step"] == answers[-1]["step"]]
    body = [
        f"<h1>{shown(Path(recipe.output_dir).name)}</h1>",
        f"<p>{shown(_summary(recipe, plan, data))}</p>",
        "<h2>Alarms</h2>" if alarms else "",
        f'<div class="alarms">{_table(("step", "alarm", "what is wrong; what to do"), alarms)}</div>',
        f'<div class="plots">{"".join(plots)}</div>',
        "<h2>Data</h2>",
        _table(("language", "rows", "tokens", "supervised tokens"), _languages(data)),
        "<h2>Last answers</h2>" if last else "",
        _table(("language", "prompt", "answer", "stopped"), _rows(last, ("language", "prompt", "answer", "stopped"))),
        "<h2>Recipe</h2>",
        f"<pre>{shown(as_yaml(Privacy(recipe.data).recipe(recipe)))}</pre>",
    ]
    page = "\n".join(body)
    path = run / "report.html"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{shown(run.name)}</title>'
        f"<style>{STYLE}</style>{page}</html>\n",
        encoding="utf-8",
    )
    return path


def _summary(recipe: Recipe, plan: Plan, data: Mapping[str, Any]) -> str:
    schedule = plan.schedule.in_words() if plan.schedule else ""
    return (
        f"{recipe.method.upper()} from {recipe.model.base}: {plan.steps:,} steps of {plan.global_batch} rows, "
        f"{plan.epochs:.3g} epochs; "
        f"{schedule}; {data['rows_kept']:,} of {data['rows_read']:,} rows kept."
    )


def _languages(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (code, f"{n['rows']:,}", f"{n['tokens']:,}", f"{n['supervised_tokens']:,}")
        for code, n in data["languages"].items()
    ]


def _rows(lines: Sequence[Line], keys: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(str(line[key]) for key in keys) for line in lines]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [("th", head), *(("td", row) for row in rows)]
    lines = ("".join(f"<{tag}>{shown(text)}</{tag}>" for text in row) for tag, row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
