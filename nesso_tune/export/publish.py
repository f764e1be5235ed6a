"""Publishes the model of a run as `final/`: through the gate of its recipe, if it has one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nesso_tune.chat.base_template import read_templates
from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.distributed.process_group import barrier, is_main_process
from nesso_tune.evaluation.gate import decide_all, load_gate, refusal, verdict_lines
from nesso_tune.evaluation.records import GateRecord, SuiteRecord, gate_record, suite_record, write_records
from nesso_tune.evaluation.runner import check_tasks, evaluate
from nesso_tune.export.card import CARD, model_card, read_card
from nesso_tune.export.final_folder import finish_folder, save_model
from nesso_tune.files import atomic_write, make_staging_folder, remove, replace_folder
from nesso_tune.hub import base_folder
from nesso_tune.logs import logger
from nesso_tune.model.loading import load_model
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import CANDIDATE, FINAL
from nesso_tune.training.state_dict import get_weights

PARENT = "parent"  # folder of the weights that a run starts from, while they are evaluated


def gate_of(recipe: Recipe) -> str | None:
    """The gate that the model of a recipe must pass; None without one.

    Random weights have no answers to lose, so a run that starts from them has no gate.
    """
    gate = None if recipe.evaluation is None else recipe.evaluation.gate
    return None if recipe.model.random_init else gate


def check_gate(recipe: Recipe) -> None:
    """Checks before training that the gate of a recipe can run.

    Raises:
        RecipeError, DataError, RunEnvironmentError: if the gate is faulty, its data is not at hand, or lm-eval is
            missing.
    """
    if (name := gate_of(recipe)) is not None:
        for suite in load_gate(name)[1].values():
            check_tasks(suite)
    elif recipe.evaluation is not None and recipe.evaluation.gate is not None and is_main_process():
        logger.info("evaluation.gate: not applied: the run starts from random weights, which have no answers to lose")


def model_folder(recipe: Recipe) -> Path:
    """Where the model of a run is written: `final/`, or `candidate/` if it has to pass a gate."""
    return Path(recipe.output_dir) / (FINAL if gate_of(recipe) is None else CANDIDATE)


def publish(recipe: Recipe, chat: ChatTokenizer) -> None:
    """Lets the model in `candidate/` pass the gate of the recipe, and renames it to `final/`. All ranks must call this.

    Without a gate it is in `final/` already. Results and verdicts are kept in the folder, and shown in its card.

    Raises:
        GateRefused: if the model is worse than the weights that the run started from. It stays in `candidate/`.
    """
    run, candidate = Path(recipe.output_dir), Path(recipe.output_dir) / CANDIDATE
    if (name := gate_of(recipe)) is None:
        if is_main_process():
            remove(candidate)  # of an earlier start, with a gate
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the trained model, which is in the folder now
    barrier()  # the folder is written by rank 0
    gate, suites = load_gate(name)
    with _parent(recipe, chat) as parent:
        results = {suite: evaluate([str(candidate), parent], each) for suite, each in suites.items()}
    (verdicts,) = decide_all(gate, results, parent).values()
    remedy = (
        f"the weights are in {candidate}: train another way with --overwrite, or relax evaluation.gate and run this "
        "command again to publish them"
    )
    refused = refusal(str(run), recipe.model.base, verdicts, remedy)
    if is_main_process():
        for line in [f"gate {name} against {recipe.model.base}: {gate.title}", *verdict_lines(gate, verdicts)]:
            logger.info(line)
        records: list[SuiteRecord | GateRecord] = [suite_record(s, suites[s], results[s][0]) for s in suites]
        keep_results(candidate, [*records, gate_record(name, gate, recipe.model.base, verdicts)])
        if refused is None:
            replace_folder(candidate, run / FINAL)
    barrier()
    if refused is not None:
        refused.on_all_ranks = True
        raise refused


def keep_results(folder: Path, records: list[SuiteRecord | GateRecord]) -> None:
    """Writes results into a model folder, and renews its card unless somebody edited it."""
    generated = (folder / CARD).is_file() and read_card(folder) == model_card(folder)
    write_records(folder, records)
    if generated:
        atomic_write(folder / CARD, model_card(folder))


@contextmanager
def _parent(recipe: Recipe, chat: ChatTokenizer) -> Iterator[str]:
    """The folder of the weights that the run started from. A base without a chat template gets that of the run."""
    section = recipe.model
    folder = base_folder(section.base, section.revision, weights=True)
    if read_templates(folder):
        yield str(folder)
        return
    parent = Path(recipe.output_dir) / PARENT
    if is_main_process():
        model = load_model(section, chat, recipe.seed)
        staging = make_staging_folder(parent)
        save_model(get_weights(model), model, staging, section.dtype)
        chat.save(staging)
        finish_folder(staging, parent)
    barrier()
    try:
        yield str(parent)
    finally:
        if is_main_process():
            remove(parent)
