"""`report.html`: a run at a glance, in one file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nesso_tune.data.privacy import Privacy
from nesso_tune.publish.markup import shown
from nesso_tune.publish.plots import plot
from nesso_tune.recipes.plan import Plan
from nesso_tune.recipes.schema import Recipe, as_yaml
from nesso_tune.training.alarms import alarms_of
from nesso_tune.training.metrics import read_metrics

Line = Mapping[str, Any]
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
    alarms = _rows(alarms_of(lines), ("step", "alarm", "said"))
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
