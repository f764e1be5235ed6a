"""`provenance.json` of a model folder: every training stage of the model, from its base on.

The file travels with the model: a run whose base has one adds its own stage. It names no private source, and no hash of
data. The model card is made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nesso_tune.cache import cache_root
from nesso_tune.data.files import is_local
from nesso_tune.data.privacy import Privacy, source_name
from nesso_tune.data.report import DataReport
from nesso_tune.data.sources import PASSED_ROWS
from nesso_tune.files import atomic_write
from nesso_tune.hub import is_hub_id
from nesso_tune.logs import logger
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe
from nesso_tune.runs.provenance import RunFacts

PROVENANCE = "provenance.json"
VERSION = 1
# Metrics of the last evaluation that the card shows; `train_` is on training data.
METRICS = ("eval_loss", "stop_rate", "exact_match", "train_exact_match", "eval_rewards/accuracies", "closer_to_chosen")


@dataclass(frozen=True)
class StageSource:
    """A source of training data.

    Attributes:
        name: path, hub id or alias; `private source N` if it is private.
        hub: whether `name` is a data set of the hub.
        private: whether it is private.
        rows, tokens: what was kept of it; None if it is private.
    """

    name: str
    hub: bool
    private: bool
    rows: int | None
    tokens: int | None


@dataclass(frozen=True)
class Stage:
    """One training run of a model; the names of the fields are JSON keys.

    Attributes:
        method: sft or dpo.
        name: of the run directory.
        base: hub id or folder that the run started from.
        base_revision: its pinned commit.
        base_on_hub: whether `base` is a hub id.
        random_init: the weights of the base were random.
        nesso_tune, versions: of the software.
        device, processes, attention: where and how it ran.
        steps, epochs, global_batch, sequence_len: size of the run.
        schedule: learning rate over the steps, in words.
        hyperparameters: further values by recipe key.
        selection: sentences on which checkpoint was exported, unless it is the last one.
        rows, tokens, supervised_tokens: of the training data.
        languages: tokens by language code.
        sources: the training data.
        metrics: last values of `METRICS`.
        parameters: number of weights.
        card: the `card` section of the recipe.
    """

    method: str
    name: str
    base: str
    base_revision: str | None
    base_on_hub: bool
    random_init: bool
    nesso_tune: str
    versions: dict[str, str]
    device: str
    processes: int
    attention: str
    steps: int
    epochs: float | None
    global_batch: int
    sequence_len: int
    schedule: str
    hyperparameters: dict[str, Any]
    selection: list[str]
    rows: int
    tokens: int
    supervised_tokens: int
    languages: dict[str, int]
    sources: list[StageSource]
    metrics: dict[str, float]
    parameters: int
    card: dict[str, Any]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        plan: Plan,
        report: DataReport,
        facts: RunFacts,
        metrics: Mapping[str, Any],
        selection: Sequence[str],
        parameters: int,
    ) -> Stage:
        """The stage of a run that has trained.

        Args:
            recipe, plan, report, facts: of the run.
            metrics: last value of each metric.
            selection: see the attribute.
            parameters: number of weights of the model.
        """
        base = recipe.model.base
        return cls(
            method=recipe.method,
            name=Path(recipe.output_dir).name,
            base=base,
            base_revision=recipe.model.revision,
            base_on_hub=is_hub_id(base) and not local_path(base).exists(),
            random_init=recipe.model.random_init,
            nesso_tune=facts.nesso_tune,
            versions=facts.versions,
            device=facts.device,
            processes=facts.world_size,
            attention=facts.attention,
            steps=plan.steps,
            epochs=plan.epochs,
            global_batch=plan.global_batch,
            sequence_len=recipe.data.sequence_len,
            schedule=plan.schedule.in_words() if plan.schedule else "",
            hyperparameters=_hyperparameters(recipe),
            selection=list(selection),
            rows=report.rows_kept,
            tokens=report.tokens,
            supervised_tokens=report.supervised_tokens,
            languages={code: counts.tokens for code, counts in report.languages.items()},
            sources=_sources(recipe, report),
            metrics={key: float(metrics[key]) for key in METRICS if isinstance(metrics.get(key), (int, float))},
            parameters=parameters,
            card=recipe.card.model_dump(),
        )


def _hyperparameters(recipe: Recipe) -> dict[str, Any]:
    adapter = recipe.model.adapter
    values: dict[str, Any] = {
        "model.dtype": recipe.model.dtype,
        "model.adapter": None if adapter is None else f"{adapter.type}, r {adapter.r}, alpha {adapter.alpha:g}",
        "train.optimizer": recipe.train.optimizer,
        "train.adam_beta1": recipe.train.adam_beta1,
        "train.adam_beta2": recipe.train.adam_beta2,
        "train.weight_decay": recipe.train.weight_decay,
        "train.max_grad_norm": recipe.train.max_grad_norm,
        "seed": recipe.seed,
    }
    if isinstance(recipe, SFTRecipe):
        values["data.packing"] = recipe.data.packing
        values["data.roles_to_train"] = ", ".join(recipe.data.roles_to_train)
    if isinstance(recipe, DPORecipe):
        values["dpo.beta"] = recipe.dpo.beta
        values["dpo.loss"] = ", ".join(f"{name} {weight:g}" for name, weight in recipe.dpo.loss.items())
    return {key: value for key, value in values.items() if value is not None}


def _sources(recipe: Recipe, report: DataReport) -> list[StageSource]:
    privacy = Privacy(recipe.data)
    hidden, names = privacy.hidden_sources(), privacy.source_names()
    out = []
    for i, (source, name, counts) in enumerate(zip(recipe.data.sources, names, report.sources, strict=True)):
        if i in hidden:
            out.append(StageSource(name, hub=False, private=True, rows=None, tokens=None))
        else:
            hub = not is_local(source.path) and is_hub_id(source.path)
            passed = Path(source.path).is_relative_to(cache_root() / PASSED_ROWS)
            out.append(
                StageSource(source_name(source) if passed else source.path, hub, False, counts.rows, counts.tokens)
            )
    return out


def read_stages(folder: Path) -> list[Stage]:
    """The stages of a model folder, the first one first; empty if it has no (readable) provenance file."""
    try:
        raw = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        return [
            Stage(**{**stage, "sources": [StageSource(**source) for source in stage["sources"]]})
            for stage in raw["stages"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        logger.warning(
            f"{folder / PROVENANCE}: cannot be read: earlier stages of this model will be missing in its card"
        )
        return []


def with_card(stages: Sequence[Stage], recipe: Recipe) -> list[Stage]:
    """The stages of a model; the last one gets the card section of a recipe instead of the one that it trained with."""
    return [*stages[:-1], replace(stages[-1], card=recipe.card.model_dump())]


def to_provenance(stages: Sequence[Stage], export: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Content of the provenance file; `export` says how the folder was made from a run, if it was."""
    return {"version": VERSION, "stages": [asdict(stage) for stage in stages], "export": dict(export or {})}


def write_stages(folder: Path, stages: Sequence[Stage], export: Mapping[str, Any] | None = None) -> None:
    """Writes the provenance file; see `to_provenance`."""
    text = json.dumps(to_provenance(stages, export), indent=2, ensure_ascii=False)
    atomic_write(folder / PROVENANCE, text + "\n")


def without_private(stages: Sequence[Stage], recipe: Recipe) -> list[Stage]:
    """Earlier stages, with the sources hidden that are private in a later recipe."""
    privacy = Privacy(recipe.data)

    def shown(source: StageSource) -> StageSource:
        if source.private or not privacy.reveals(source.name):
            return source
        return StageSource("private source", hub=False, private=True, rows=None, tokens=None)

    return [replace(stage, sources=list(map(shown, stage.sources))) for stage in stages]
