"""The whole way of a run: recipe, data, plan, model, training, `final/`."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from nesso_tune.data.prepare import PreparedData, prepare_data
from nesso_tune.errors import RecipeError
from nesso_tune.model.weights import base_hash, load_model
from nesso_tune.publish.card import model_card
from nesso_tune.publish.final import save_final, whole_model
from nesso_tune.publish.report import write_report
from nesso_tune.recipes.plan import Plan
from nesso_tune.recipes.planning import make_plan
from nesso_tune.recipes.schema import Recipe
from nesso_tune.training.arguments import check_trackers
from nesso_tune.training.fit import fit
from nesso_tune.training.launched import check_launcher
from nesso_tune.training.metrics import read_metrics
from nesso_tune.training.processes import (
    check_shared,
    come_together,
    contact,
    from_first,
    idle_gpus,
    is_first,
    part,
    wait_for_all,
    world,
)
from nesso_tune.training.rundir import RunDir, open_run, write_end, write_start
from nesso_tune.training.signals import StopRequest

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers")
TINY = 20_000_000  # parameters below which several CPU threads cost more than they give


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model_dir: the finished model, `final/`.
        metrics: the last value of every metric.
        notes: what was found on opening the run directory.
        trained: False if the run had been finished before.
        asked_to_stop: a signal came so late that the run ended first; nothing more should be begun.
    """

    model_dir: Path
    metrics: dict[str, Any]
    notes: tuple[str, ...] = ()
    trained: bool = True
    asked_to_stop: bool = False


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    allow_changes: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Runs a recipe, or continues it where it stopped.

    Args:
        recipe: what to do.
        resume: `auto` continues an unfinished run, `never` refuses to, a path continues from that checkpoint.
        overwrite: removes an earlier run in `output_dir` first.
        allow_changes: dotted recipe keys whose change is accepted when a run continues.
        say: gets what a person should know on the way (what is continued, what was set aside).

    Raises:
        NessoError: the kind says what is wrong; nothing that was finished before is harmed.
        Preempted: among them, if a signal asked to stop; the same call continues.
    """
    check_trackers(recipe)
    with StopRequest() as request:
        opened = open_run(recipe, resume=resume, overwrite=overwrite, allowed=allow_changes) if is_first() else None
        try:
            if opened is not None:
                for text in _opening(opened, recipe):
                    say(text)
            data = prepare_data(recipe)
            if opened is not None and data.report["dropped"]:
                say(_dropped(data.report))
            come_together(recipe.distributed.timeout_s)
            with contact():
                run: RunDir = from_first(None if opened is None else opened.shared())
                check_shared(run.path)
                return _finished(recipe, run, data) if run.finished else _train(recipe, run, data, request)
        finally:
            part()
            if opened is not None:
                opened.close()


def _dropped(report: dict[str, Any]) -> str:
    lost = ", ".join(f"{n:,} {reason}" for reason, n in report["dropped"].items())
    return f"{report['rows_kept']:,} of {report['rows_read']:,} rows kept; dropped: {lost}"


def _opening(run: RunDir, recipe: Recipe) -> list[str]:
    lines = list(run.notes)
    if run.checkpoint is not None:
        lines.append(f"an unfinished run: it continues from {run.checkpoint.name}")
    if not run.finished and (idle := idle_gpus()):
        lines.append(
            f"{idle} GPUs of this machine are idle: `nesso-tune launch` uses all, CUDA_VISIBLE_DEVICES hides some"
        )
    if not run.finished and recipe.model.dtype == "bfloat16" and not torch.cuda.is_available():
        lines.append("bfloat16 is slow on a CPU: model.dtype: float32 is faster here")
    return lines


def _finished(recipe: Recipe, run: RunDir, data: PreparedData) -> TrainResult:
    plan = make_plan(recipe, world(), data.volume)
    _check_same_run(run, json.loads((run.path / "manifest.json").read_text()), run_facts(recipe, data, plan))
    return TrainResult(run.final, last_metrics(run.metrics), ("this run is finished",), trained=False)


def _train(recipe: Recipe, run: RunDir, data: PreparedData, request: StopRequest) -> TrainResult:
    plan = make_plan(recipe, world(), data.volume)
    check_launcher(recipe, plan, os.environ)
    if plan.processes == 1:  # nothing to share, whatever a launcher's configuration says
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    model = load_model(recipe.model, data.chat, recipe.seed)
    _choose_threads(model.num_parameters())
    facts = run_facts(recipe, data, plan)
    if run.checkpoint is not None:
        _check_same_run(run, json.loads((run.checkpoint / "manifest.json").read_text()), facts)
    if is_first():
        if run.checkpoint is None:
            run.metrics.unlink(missing_ok=True)
        write_start(run, recipe, facts)
    wait_for_all()
    trainer = fit(model, data, recipe, plan, run, facts, request)
    bare = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model, state = whole_model(trainer.model_wrapped, bare, recipe.model, data.chat, recipe.seed)
    metrics = last_metrics(run.metrics)
    if is_first():
        card = model_card(recipe, plan, data.report, metrics)
        save_final(state, model, data.chat, card, run.final, recipe.model.dtype)
        write_report(run.path, recipe, plan, data.report)
        write_end(run)
    asked = any(gather_object([request.asked]))  # which also waits for all
    return TrainResult(run.final, metrics, run.notes, asked_to_stop=asked)


def last_metrics(path: Path) -> dict[str, Any]:
    """The last value of every metric in a metrics file."""
    out: dict[str, Any] = {}
    for line in read_metrics(path) if path.exists() else []:
        if "event" not in line:
            out |= line
    return out


def run_facts(recipe: Recipe, data: PreparedData, plan: Plan) -> dict[str, Any]:
    """What a run's manifest and its checkpoints record: what it is made of, and where it runs."""
    base = base_hash(recipe.model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "nesso_tune": version("nesso-tune"),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "base": base,
        "tokenizer": data.chat.fingerprint,
        "data": data.report["fingerprint"],
        "start": f"{base}-{data.chat.fingerprint}-{data.report['fingerprint']}",
        "world_size": plan.processes,
        "global_batch": plan.global_batch,
        "threads": torch.get_num_threads(),
        "device": gpu,
        "command": sys.argv,
    }


def _check_same_run(run: RunDir, noted: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuses other data, another tokenizer, base, batch or number of processes than the run's manifest notes.

    Raises:
        RecipeError: with both values.
    """
    names = {
        "data": "the data", "tokenizer": "the tokenizer or template", "base": "the base model's weights",
        "global_batch": "the global batch",
    }  # fmt: skip
    if run.finished:  # a finished model does not depend on how many would continue it
        names = {key: names[key] for key in ("data", "tokenizer", "base")}
    changed = [key for key in names if noted.get(key) != facts[key]]
    if changed:
        what = "; ".join(f"{names[key]} changed ({noted[key]} -> {facts[key]})" for key in changed)
        raise RecipeError(str(run.path), what, "undo the change, or start anew with --overwrite or another output_dir")


def _choose_threads(parameters: int) -> None:
    """One CPU thread for tiny models: with more, the threads wait for each other longer than they compute."""
    if not torch.cuda.is_available() and parameters < TINY and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
