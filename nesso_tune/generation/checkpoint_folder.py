"""A checkpoint as a model folder: its weights, with the configuration and the tokenizer of its run."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from nesso_tune.errors import ModelError
from nesso_tune.recipes import load_recipe

WEIGHTS = "model.safetensors"
COMPLETE = ("final", "candidate")  # model folders of a run: published, or before or refused by its gate
NOT_COPIED = (".safetensors", ".safetensors.index.json", ".md", "provenance.json")  # endings of names


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run: it has no configuration of the model."""
    # not of pathlib, where these fail for a name that is too long
    return os.path.isfile(folder / "trainer_state.json") and not os.path.exists(folder / "config.json")


def model_folder_of(checkpoint: Path) -> Path:
    """A temporary model folder with links to the files of a checkpoint and of its run, deleted with this process.

    Raises:
        ModelError: if the checkpoint has no complete weights, or the run no model folder yet.
    """
    return Path(_linked(checkpoint.resolve(), str(checkpoint)).name)


@cache
def _linked(checkpoint: Path, where: str) -> TemporaryDirectory[str]:
    run = checkpoint.parent
    complete = next((run / name for name in COMPLETE if (run / name / "config.json").is_file()), None)
    if complete is None:
        what = "is a checkpoint without a tokenizer: that of its run is written when the run is finished"
        raise ModelError(where, what, "finish the run with the same `nesso-tune train` first")
    _check_complete(checkpoint, where)
    folder = TemporaryDirectory(prefix="nesso-checkpoint-")
    for file in complete.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED):
            (Path(folder.name) / file.name).symlink_to(file)
    (Path(folder.name) / WEIGHTS).symlink_to(checkpoint / WEIGHTS)
    return folder


def _check_complete(checkpoint: Path, where: str) -> None:
    """Raises ModelError for shards, and for an adapter without its base."""
    run, why = checkpoint.parent, None
    if not (checkpoint / WEIGHTS).is_file():
        why = "has its weights in shards"
    elif load_recipe(run / "recipe.yaml").model.adapter is not None:
        why = "has the weights of an adapter only"
    if why is None:
        return
    remedy = f"run `nesso-tune export {run} --average {checkpoint.name} -o FOLDER`, and name that folder"
    if not (run / "final").is_dir():
        remedy = f"name {run / 'candidate'}, the model at the end of the run"
    raise ModelError(where, f"is a checkpoint that {why}", remedy)
