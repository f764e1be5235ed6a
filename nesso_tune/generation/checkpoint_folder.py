"""A checkpoint as a model folder: its weights, with the configuration and the tokenizer of its run."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError
from nesso_tune.model.loading import load_model
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.schema import Recipe

WEIGHTS = "model.safetensors"
COMPLETE = ("final", "candidate")  # model folders of a run: published, or before or refused by its gate
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".md", "provenance.json")  # endings of names


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run: it has no configuration of the model."""
    # not of pathlib, where these fail for a name that is too long
    return os.path.isfile(folder / "trainer_state.json") and not os.path.exists(folder / "config.json")


def model_folder_of(checkpoint: Path) -> Path:
    """A temporary model folder with links to the files of a checkpoint and of its run, deleted with this process.

    While the run has no model folder yet, configuration and tokenizer are made from its recipe and the base.

    Raises:
        ModelError: if the checkpoint has no complete weights, or the base is needed and cannot be loaded.
    """
    return Path(_linked(checkpoint.resolve(), str(checkpoint)).name)


@cache
def _linked(checkpoint: Path, where: str) -> TemporaryDirectory[str]:
    run = checkpoint.parent
    recipe = load_recipe(run / "recipe.yaml")
    complete = next((run / name for name in COMPLETE if (run / name / "config.json").is_file()), None)
    _check_whole(checkpoint, where, recipe)
    folder = TemporaryDirectory(prefix="nesso-checkpoint-")
    if complete is None:
        _write_configuration(recipe, Path(folder.name))
    for file in () if complete is None else complete.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            (Path(folder.name) / file.name).symlink_to(file)
    (Path(folder.name) / WEIGHTS).symlink_to(checkpoint / WEIGHTS)
    return folder


def _write_configuration(recipe: Recipe, folder: Path) -> None:
    """Writes what `final/` will have besides its weights, from the base."""
    chat = chat_tokenizer(recipe.model, recipe.chat)
    model = load_model(recipe.model, chat, recipe.seed)
    model.config.dtype = recipe.model.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    chat.save(folder)


def _check_whole(checkpoint: Path, where: str, recipe: Recipe) -> None:
    """Raises ModelError for shards, and for an adapter without its base."""
    run, why = checkpoint.parent, None
    if not (checkpoint / WEIGHTS).is_file():
        why = "has its weights in shards"
    elif recipe.model.adapter is not None:
        why = "has the weights of an adapter only"
    if why is None:
        return
    if (run / "final").is_dir():
        remedy = f"run `nesso-tune export {run} --average {checkpoint.name} -o FOLDER`, and name that folder"
    elif (run / "candidate").is_dir():
        remedy = f"name {run / 'candidate'}, the model at the end of the run"
    else:
        remedy = "finish the run with the same `nesso-tune train` first"
    raise ModelError(where, f"is a checkpoint that {why}", remedy)
