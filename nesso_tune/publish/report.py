"""`report.html`: a run at a glance, in one file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nesso_tune.recipes.plan import Plan
from nesso_tune.recipes.schema import Recipe
from nesso_tune.training.metrics import read_metrics

Line = Mapping[str, Any]
Points = list[tuple[float, float]]
WIDTH, HEIGHT, MARGIN = 420, 180, 40
COLOURS = ("#1b5e9b", "#2e8b57", "#b3541e", "#7a4fa3", "#555555")
PLOTS = {  # title: the metrics drawn in it, with their parts by language
    "Loss": ("loss",),
    "Loss on held-out rows": ("eval_loss",),
    "Stop rate and exact answers": ("stop_rate", "exact_match"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Preference: accuracy on held-out pairs": ("eval_rewards/accuracies",),
    "Preference: margin on held-out pairs": ("eval_rewards/margins",),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 920px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.plots { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; max-width: 100% }
svg { max-width: 100%; height: auto } figcaption { font-weight: 600 }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
"""


def write_report(run: Path, recipe: Recipe, plan: Plan, data: Mapping[str, Any]) -> Path:
    """Writes report.html into a run directory, from its metrics.jsonl; private sources are not named."""
    lines = read_metrics(run / "metrics.jsonl")
    plots = [svg for title, names in PLOTS.items() if (svg := _plot(title, names, lines))]
    answers = [line for line in lines if line.get("event") == "answer"]
    last = [line for line in answers if line["step"] == answers[-1]["step"]]
    body = [
        f"<h1>{escape(Path(recipe.output_dir).name)}</h1>",
        f"<p>{escape(_summary(recipe, plan, data))}</p>",
        f'<div class="plots">{"".join(plots)}</div>',
        "<h2>Data</h2>",
        _table(("language", "rows", "tokens", "supervised tokens"), _languages(data)),
        "<h2>Last answers</h2>" if last else "",
        _table(("language", "prompt", "answer", "stopped"), _rows(last, ("language", "prompt", "answer", "stopped"))),
        "<h2>Recipe</h2>",
        f"<pre>{escape(_shown(recipe))}</pre>",
    ]
    page = "\n".join(body)
    path = run / "report.html"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(run.name)}</title>'
        f"<style>{STYLE}</style>{page}</html>\n",
        encoding="utf-8",
    )
    return path


def _summary(recipe: Recipe, plan: Plan, data: Mapping[str, Any]) -> str:
    schedule = plan.schedule.in_words() if plan.schedule else ""
    return (
        f"{recipe.method.upper()} from {recipe.model.base}: {plan.steps:,} steps of {plan.global_batch} rows; "
        f"{schedule}; {data['rows_kept']:,} of {data['rows_read']:,} rows kept."
    )


def _shown(recipe: Recipe) -> str:
    """The recipe as YAML, private sources by number only."""
    sources = [
        source.model_copy(update={"path": f"private source {i + 1}"}) if source.private else source
        for i, source in enumerate(recipe.data.sources)
    ]
    data = recipe.data.model_copy(update={"sources": tuple(sources)})
    return recipe.model_copy(update={"data": data}).to_yaml()


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
    lines = ("".join(f"<{tag}>{escape(text)}</{tag}>" for text in row) for tag, row in cells)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _plot(title: str, names: Sequence[str], lines: Sequence[Line]) -> str:
    """An SVG of the metrics over the steps; empty if none was measured."""
    keys = sorted({key for line in lines for key in line if any(key == n or key.startswith(f"{n}/") for n in names)})
    series = {key: _points(key, lines) for key in keys}
    series = {key: points for key, points in series.items() if points}
    if not series:
        return ""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(*ys, 0.0), max(*ys, 1e-12)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def place(x: float, y: float) -> str:
        across = (x - min(xs)) / max(max(xs) - min(xs), 1)
        return f"{MARGIN + across * width:.1f},{HEIGHT - MARGIN - (y - low) / (high - low) * height:.1f}"

    drawn = []
    for (key, points), colour in zip(series.items(), COLOURS * 4, strict=False):
        path = " ".join(place(x, y) for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        at = MARGIN + 90 * (len(drawn) - 1)
        drawn.append(f'<text x="{at}" y="{HEIGHT - 4}" font-size="11" fill="{colour}">{escape(key)}</text>')
    axes = (
        f'<path d="M{MARGIN},{MARGIN} V{HEIGHT - MARGIN} H{WIDTH - MARGIN}" fill="none" stroke="#999"/>'
        f'<text x="2" y="{MARGIN + 4}" font-size="11">{high:.3g}</text>'
        f'<text x="2" y="{HEIGHT - MARGIN}" font-size="11">{low:.3g}</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 14}" font-size="11" text-anchor="end">'
        f"step {max(xs):g}</text>"
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{axes}{"".join(drawn)}</svg></figure>'
    )


def _points(key: str, lines: Sequence[Line]) -> Points:
    found = ((line["step"], line[key]) for line in lines if key in line)
    return [(float(x), float(y)) for x, y in found if isinstance(y, (int, float))]
