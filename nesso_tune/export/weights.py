"""Weights of a finished run: those of `final/`, of a checkpoint in float32, and averages of several models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError, closest, first_line
from nesso_tune.export.final_folder import adapted_base
from nesso_tune.files import sha256
from nesso_tune.hub import has_weights
from nesso_tune.logs import logger
from nesso_tune.model.loading import base_hash
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import flag_path
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.checkpoint import (
    MANIFEST,
    checkpoint_path,
    checkpoint_step,
    checkpoints,
    is_checkpoint_name,
    read_json,
    read_manifest,
)
from nesso_tune.runs.layout import FINAL, RECIPE, changed_final_files
from nesso_tune.runs.run_directory import check_final_exists, find_run
from nesso_tune.training.checkpoint import load_weights

AVERAGE, LAST = "--average", "last:"


@dataclass(frozen=True)
class FinishedRun:
    """A run directory with a complete `final/`.

    Attributes:
        path: the run directory.
        manifest: its manifest.
        recipe: its resolved recipe, from recipe.yaml.
    """

    path: Path
    manifest: dict[str, Any]
    recipe: Recipe

    @classmethod
    def open(cls, path: Path) -> FinishedRun:
        """Opens a run directory, or the run that a `final/` folder belongs to.

        Raises:
            RunEnvironmentError: if there is no run, or it is not finished.
            ModelError: if files of `final/` are missing, have another size, or cannot be read.
            RecipeError: if its recipe.yaml was edited and is not valid.
        """
        folder = find_run(path)
        manifest = read_json(folder, MANIFEST)
        check_final_exists(folder)
        if not manifest.get("finished"):
            raise RunEnvironmentError(
                str(path), f"has no {FINAL}/: the run is not finished", "finish it with the same `nesso-tune train`"
            )
        changed = changed_final_files(folder, manifest)
        if not has_weights(folder / FINAL) or changed:
            first = f" (first: {changed[0]})" if changed else ""
            what = f"files are missing or have another size{first}"
            raise ModelError(str(folder / FINAL), what, "restore them, or train again with --overwrite")
        _check_readable(folder / FINAL)
        return cls(folder, manifest, load_recipe(folder / RECIPE))

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
        return self.path / FINAL

    @property
    def final_checkpoint(self) -> Path:
        """The checkpoint with the weights of `final/` before they were merged and rounded.

        Raises:
            RunEnvironmentError: if the run has no such checkpoint any more.
        """
        saved, best = checkpoints(self.path), self.manifest.get("best")
        found = saved[:1] if best is None else [checkpoint_path(self.path, best["step"])]
        if not found or not found[0].is_dir():
            raise RunEnvironmentError(
                str(self.path), f"the checkpoint with the weights of {FINAL}/ was removed",
                f"export --to hf in the dtype of {FINAL}/",
            )  # fmt: skip
        return found[0]


def _check_readable(folder: Path) -> None:
    """Raises ModelError for a file of a model folder whose content is damaged, as far as its format shows it."""
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except (ValueError, SafetensorError) as error:
            what = f"is damaged ({first_line(error)})"
            raise ModelError(str(file), what, "restore it, or train again with --overwrite") from None


def load_final(folder: Path) -> PreTrainedModel:
    """A model folder in float32, on the CPU.

    Raises:
        ModelError: if it cannot be loaded.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # transformers raises many types for a damaged folder
        raise ModelError(str(folder), f"cannot be loaded ({first_line(error)})", "check the folder") from None
    trained: PreTrainedModel = model.eval()
    return trained


def load_checkpoint(run: FinishedRun, checkpoint: Path) -> PreTrainedModel:
    """The model of a checkpoint in float32: shards consolidated, and an adapter merged into its base.

    Raises:
        RunEnvironmentError: if a file of the checkpoint is missing or damaged.
        ModelError: if the base of an adapter has other weights than when the run was trained.
    """
    check_checkpoint(checkpoint)
    if run.recipe.model.adapter is None:
        model = load_final(run.final)
        load_weights(checkpoint, model)
        return model
    _check_base(run)
    chat = chat_tokenizer(run.recipe.model, run.recipe.chat)
    base, adapted = adapted_base(run.recipe.model, chat, run.recipe.seed)
    load_weights(checkpoint, base)
    merged: PreTrainedModel = adapted.merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True).eval()


def _check_base(run: FinishedRun) -> None:
    section, trained = run.recipe.model, run.manifest.get("base")
    if trained is not None and base_hash(section) != trained:
        raise ModelError(
            f"model.base {section.base}", "has other weights or settings than when the adapter was trained",
            f"restore it, or export --to hf without --average, in the dtype of {FINAL}/",
        )  # fmt: skip


def check_checkpoint(checkpoint: Path) -> None:
    """Raises RunEnvironmentError if a file of a checkpoint is missing or damaged."""
    try:
        read_manifest(checkpoint)
    except ValueError as error:
        raise RunEnvironmentError(str(checkpoint), str(error), "export without it") from None


@dataclass(frozen=True)
class Part:
    """A model that an average consists of: a checkpoint of the run, or a model folder.

    `folder` is a model folder with its tokenizer and provenance.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    folder: Path


def average(run: FinishedRun, text: str) -> tuple[PreTrainedModel, list[Part]]:
    """The mean of the weights of several models, with equal shares, in float32.

    Averaging fine-tuned weights: Wortsman et al., 2022, arXiv:2203.05482. Adapters are merged before, since the mean of
    two products is not the product of the means.

    Args:
        run: its checkpoints can be named, and its `final/` is the form of the result.
        text: `last:K` for the K newest checkpoints, or names separated by commas: checkpoints of the run, run
            directories or model folders.

    Returns:
        The model, and its parts.

    Raises:
        RecipeError: for a malformed text, or models of different shapes or settings.
        ModelError, RunEnvironmentError: if a part is missing or damaged.
    """
    parts = _parts(run, text)
    _warn_about_tokenizers(run, parts)
    mean = load_final(run.final)
    total = {name: torch.zeros_like(weight) for name, weight in _tensors(mean)}
    for part in parts:
        model = part.load()
        weights = dict(_tensors(model))
        _check_same_shape(run, part, total, weights)
        _check_same_computation(run, part, mean, model)
        for name, weight in weights.items():
            total[name].add_(weight, alpha=1 / len(parts))
    with torch.no_grad():
        for name, weight in _tensors(mean):
            weight.copy_(total[name])
    return mean, parts


def _parts(run: FinishedRun, text: str) -> list[Part]:
    if text.startswith(LAST):
        count, saved = text.removeprefix(LAST), checkpoints(run.path)
        if not count.isdecimal() or int(count) < 1:
            raise RecipeError(AVERAGE, f"`{text}` has no number", "write last:3 for the three newest checkpoints")
        if int(count) == 1:
            one = saved[0].name if saved else "checkpoint-N"
            raise RecipeError(
                AVERAGE, f"`{text}` is one checkpoint, not an average", f"write last:2 or more, or {one} to export it"
            )
        if int(count) > len(saved):
            raise RecipeError(
                AVERAGE, f"{run.path} has {len(saved)} checkpoints, not {count}",
                f"write last:{len(saved)}, or train with a larger checkpoint.keep" if saved else "name model folders",
            )  # fmt: skip
        return [_checkpoint_part(run, checkpoint) for checkpoint in saved[: int(count)]]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RecipeError(AVERAGE, f"`{text}` has an empty name", "write last:K, or names separated by commas")
    parts = [_named_part(run, name) for name in names]
    folders = [Path(part.name).resolve() for part in parts]
    for name, folder in zip(names, folders, strict=True):
        if folders.count(folder) > 1:
            raise RecipeError(AVERAGE, f"{name} is named twice", "name each model once: all have equal shares")
    return parts


def _named_part(run: FinishedRun, name: str) -> Part:
    folder = Path(flag_path(name))
    if is_checkpoint_name(folder.name):
        if name == folder.name:
            folder = run.path / name
        if not folder.is_dir():
            steps = [f"checkpoint-{checkpoint_step(saved)}" for saved in checkpoints(run.path)]
            near = closest(name, [*steps, FINAL]) or "final"
            raise RecipeError(AVERAGE, f"no checkpoint {name} in {run.path}", f"did you mean {near}?")
        owner = run if folder.parent.resolve() == run.path.resolve() else FinishedRun.open(folder.parent)
        return _checkpoint_part(owner, folder)
    if name == FINAL:
        folder = run.final
    elif (folder / FINAL).is_dir():
        folder = folder / FINAL
    if not has_weights(folder):
        raise ModelError(
            f"{AVERAGE} {name}", "no such checkpoint, run or model folder with weights",
            "name checkpoint-N of this run, a run directory, or a folder with config.json and *.safetensors",
        )  # fmt: skip
    return Part(str(folder), lambda: load_final(folder), folder)


def _checkpoint_part(run: FinishedRun, checkpoint: Path) -> Part:
    return Part(str(checkpoint), lambda: load_checkpoint(run, checkpoint), run.final)


def _warn_about_tokenizers(run: FinishedRun, parts: list[Part]) -> None:
    own = sha256(run.final / "tokenizer.json")
    for part in parts:
        file = part.folder / "tokenizer.json"
        if not file.is_file() or sha256(file) != own:
            logger.log(logging.WARNING, f"{AVERAGE}: {part.name} has another tokenizer than {run.final}")


# Settings that change neither the weights nor what a model computes with them in an evaluation.
_OTHER_SETTINGS = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings", "vocab_size", "initializer_range", "attention_dropout",
    "attn_implementation", "_attn_implementation",
}  # fmt: skip


def _check_same_computation(run: FinishedRun, part: Part, own: PreTrainedModel, other: PreTrainedModel) -> None:
    """Raises RecipeError for models that compute something else with weights of the same shapes, e.g. other heads."""
    settings, others = (json.loads(model.config.to_json_string(use_diff=False)) for model in (own, other))
    for key in sorted((settings.keys() & others.keys()) - _OTHER_SETTINGS):  # a key of one alone is another tool's note
        if settings[key] != others[key]:
            raise RecipeError(
                AVERAGE, f"{part.name} has another {key} than {run.final} ({others[key]}, {settings[key]})",
                "average models of the same base",
            )  # fmt: skip


def _check_same_shape(run: FinishedRun, part: Part, own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    shapes, others = ({name: tuple(weight.shape) for name, weight in of.items()} for of in (own, other))
    different = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
    if different:
        name = different[0]
        raise RecipeError(
            AVERAGE, f"{part.name} has another shape than {run.final} ({name}: {others.get(name)}, {shapes.get(name)})",
            "average models of the same base, with the same number of tokens",
        )  # fmt: skip


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights by name; tied ones once."""
    for name, weight in model.named_parameters():
        yield name, weight.detach()
