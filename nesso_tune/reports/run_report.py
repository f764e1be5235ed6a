"""`report.html`: the state of a run, its charts, alarms, answers, data and recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.metric_registry import METRICS
from nesso_tune.recipes.schema import as_yaml
from nesso_tune.reports.charts import Mark, chart_data, run_charts
from nesso_tune.reports.html import PLOTLY, render, write_page
from nesso_tune.reports.run_record import RunRecord, flattened, shown_value, without_nulls
from nesso_tune.runs.checkpoint import MANIFEST, checkpoint_step, checkpoints
from nesso_tune.runs.layout import FINAL, REPORT
from nesso_tune.runs.run_status import format_duration

MAX_PROMPTS = 200  # with their answers, in a report
_SHELL = re.compile(r"""[\s'"\\$`;&|<>()*?!#~{}\[\]]|^$""")  # what a shell would not leave as it is
_ROLE = re.compile(r"(?:^|\n)(system|user|assistant|tool)\n")


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run directory and returns its path.

    Raises:
        RunEnvironmentError: if the folder is not a run directory.
    """
    record = RunRecord.read(run)
    page = render(
        "report.html.j2",
        name=run.resolve().name,
        state=record.state,
        ended_well=record.status is None or record.status.state in ("training", "finished"),
        facts=_facts(record),
        alarms=[line for line in record.lines if line.get("event") == "alarm"],
        chart_data=chart_data(run_charts(record.lines, _planned_rates(record)), _marks(record)),
        evaluations=record.evaluations,
        prompts=_prompts(record.lines),
        data=record.data,
        parent_differences=_parent_differences(record),
        recipe=as_yaml(without_nulls(record.recipe)),
        plotly=PLOTLY,
    )
    write_page(page, run / REPORT)
    return run / REPORT


def _planned_rates(record: RunRecord) -> tuple[tuple[int, float], ...]:
    return () if record.status is None else record.status.learning_rates


def _marks(record: RunRecord) -> list[Mark]:
    marks = []
    for line in record.lines:
        if line.get("event") == "alarm":
            marks.append(Mark(line["step"], "alarm", f"{line['alarm']}: {line['said']}"))
        elif line.get("event") == "resumed":
            marks.append(Mark(line["step"], "resumed", "resumed here"))
        elif line.get("event") == "best":
            marks.append(Mark(line["taken"], "best", f"weights of {FINAL}/: best {line.get('metric', 'evaluation')}"))
    marks += [Mark(checkpoint_step(folder), "checkpoint", folder.name) for folder in checkpoints(record.path)]
    if record.status is not None and record.status.state in ("stopped", "refused", "failed"):
        marks.append(Mark(max((line["step"] for line in record.lines), default=0), "end", record.state))
    return marks


# Headline figures


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The headline figures as (name, text)."""
    manifest = record.manifest
    processes = manifest.get("world_size", 1)
    seconds, speed, mfu = record.last("seconds"), record.typical("tokens_per_second"), record.typical("mfu")
    losses = [("last loss", "loss", record.last), ("last validation loss", "eval_loss", record.last)]
    losses += [("best validation loss", "eval_loss", record.best)]
    found = [(name, _by_language(record, metric, value)) for name, metric, value in losses]
    found += [((METRICS[name].chart or name).lower(), _by_language(record, name, record.last)) for name in (
        "stop_rate", "language_fidelity", "eval_rewards/accuracies")]  # fmt: skip
    found += [
        ("training time", format_duration(seconds)),
        ("GPU hours", f"{seconds * processes / 3600:.3g}" if seconds and manifest.get("device") != "cpu" else ""),
        ("speed", f"{speed:,.0f} tokens/s" if speed else ""),
        ("MFU", f"{mfu:.1%}" if mfu else ""),
        ("trained", _trained(record)),
        ("hardware", f"{processes} × {manifest.get('device', 'unknown')}"),
        ("base", str((record.recipe.get("model") or {}).get("base", ""))),
        ("versions", _versions(manifest)),
        ("command", shown_command(manifest.get("command", ()))),
    ]
    return [(name, text) for name, text in found if text]


def shown_command(words: Sequence[str]) -> str:
    """A recorded command line as the user typed it, without the path of the program, which says who ran it where."""
    if not words:
        return ""
    program, name = words[0], Path(words[0]).name
    if "kernel_launcher" in name:
        return "from a notebook"
    if (name == "__main__.py" and Path(program).parent.name == "nesso_tune") or name in (
        "nesso-tune",
        "nesso-tune.exe",
    ):
        shown = ["nesso-tune"]
    else:
        shown = ["python", name if Path(program).is_absolute() else program] if name.endswith(".py") else [name]
    return " ".join(shlex.quote(word) if _SHELL.search(word) else word for word in (*shown, *words[1:]))


def _trained(record: RunRecord) -> str:
    batch, epochs = record.manifest.get("global_batch"), record.last("epoch")
    if not record.measured or batch is None or epochs is None:
        return ""
    return f"{record.measured[-1]['step']:,} steps of {batch:,} rows, {epochs:.3g} epochs"


def _by_language(record: RunRecord, metric: str, value: Any) -> str:
    if (overall := value(metric)) is None:
        return ""
    parts = [(code, value(f"{metric}/{code}")) for code in record.languages(metric)]
    shown = ", ".join(f"{code} {number:.4g}" for code, number in parts if number is not None)
    return f"{overall:.4g}" + (f" ({shown})" if shown else "")


def _versions(manifest: Mapping[str, Any]) -> str:
    versions = {"nesso-tune": manifest.get("nesso_tune", ""), "Python": manifest.get("python", "")}
    return ", ".join(f"{name} {text}" for name, text in {**versions, **manifest.get("versions", {})}.items() if text)


# Answers over time


@dataclass(frozen=True)
class PromptHistory:
    """The answers to one prompt over the evaluations.

    Attributes:
        language: of the prompt.
        turns: (role, text) of the prompt.
        expected: the reference answer.
        answers: (step, answer, whether it ended by itself), in the order of steps.
        worse: an earlier answer was equal to the expected one, or ended by itself, and the last one is or does not.
    """

    language: str
    turns: list[tuple[str, str]]
    expected: str
    answers: list[tuple[int, str, bool]]
    worse: bool


def _prompts(lines: Sequence[Mapping[str, Any]]) -> list[PromptHistory]:
    histories: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        if line.get("event") == "answer":
            histories.setdefault((line["language"], line["prompt"]), []).append(line)
    return [_history(prompt, answers) for (_, prompt), answers in list(histories.items())[:MAX_PROMPTS]]


def _history(prompt: str, answers: Sequence[Mapping[str, Any]]) -> PromptHistory:
    expected = str(answers[0].get("expected") or "")
    good = [(line["stopped"], line["answer"].strip() == expected.strip()) for line in answers]
    worse = any(any(earlier[i] for earlier in good[:-1]) and not good[-1][i] for i in (0, 1))
    steps = [(line["step"], line["answer"], line["stopped"]) for line in answers]
    return PromptHistory(answers[0]["language"], _turns(prompt), expected, steps, worse)


def _turns(prompt: str) -> list[tuple[str, str]]:
    """(role, text) of each turn of a decoded prompt, without the empty one that the model continues."""
    pieces = _ROLE.split(prompt)
    if pieces[0].strip() or len(pieces) < 3:  # another template: shown as it is
        return [("prompt", prompt.strip())]
    return [(role, text.strip()) for role, text in zip(pieces[1::2], pieces[2::2], strict=True) if text.strip()]


def _parent_differences(record: RunRecord) -> list[tuple[str, str, str]]:
    """(key, value of the parent, value of this run) where the recipe differs from that of the run in `model.base`."""
    base = Path(str((record.recipe.get("model") or {}).get("base", "")))
    if base.name != FINAL or not (base.parent / MANIFEST).is_file():
        return []
    parent, own = flattened(RunRecord.read(base.parent).recipe), flattened(record.recipe)
    return [
        (key, shown_value(parent.get(key)), shown_value(own.get(key)))
        for key in sorted(parent.keys() | own.keys())
        if parent.get(key) != own.get(key) and key not in ("output_dir", "model.base")
    ]
