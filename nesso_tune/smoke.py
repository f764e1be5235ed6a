"""`--smoke`: any recipe, anywhere, in about a minute: a tiny stand-in for its base, its first rows, a few steps.

The whole way of a run is gone, with the recipe's own template, format, mask, loss and adapter; only size and length
are cut down. Nothing of the real run is touched, and nothing is fetched.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from nesso_tune.chat.files import base_at_hand, tokenizer_files
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data import cache
from nesso_tune.data.files import expand, is_local
from nesso_tune.data.hub import is_cached
from nesso_tune.model.standin import FALLBACK, build_standin, shrunk
from nesso_tune.model.weights import check_complete
from nesso_tune.recipes.schema import RECIPES, Recipe, dump
from nesso_tune.recipes.sections import ChatSection, ModelSection, Source
from nesso_tune.recipes.shape import find_config
from nesso_tune.recipes.shipped import local_path, shipped

Say = Callable[[str], None]
STEPS, ROWS, LENGTH = 4, 200, 4096
BUNDLED = {"sft": ("conversations", "toolcalls"), "dpo": ("pairs",)}  # rows under recipes/quickstart/data/
LIMITS: dict[str, dict[str, Any]] = {  # what a number is cut down to
    "data": {"sequence_len": LENGTH},
    "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "evaluation": {"samples": 4, "train_samples": 4, "max_new_tokens": 16},
    "checkpoint": {"keep": 2},
}


def smoke_recipe(recipe: Recipe, made: dict[str, str], say: Say) -> Recipe:
    """The recipe cut down.

    Args:
        recipe: the real one.
        made: the results of earlier recipes of the same command, real `final/` to smoke `final/`; this recipe's is
            added.
        say: told what stands in for what.

    Raises:
        ModelError, DataError: for a local base or data file that is wrong: the real run would fail too.
    """
    raw = dump(recipe)
    output = f"{recipe.output_dir.rstrip('/')}-smoke"
    base = made.get(_path(recipe.model.base)) or _standin(recipe.model, recipe.chat, say)
    made[_path(f"{recipe.output_dir}/final")] = f"{output}/final"
    on_gpu = torch.cuda.is_available()
    raw["output_dir"] = output
    raw["model"] |= {"base": base, "revision": None, "random_init": False, "trust_remote_code": False}
    if not on_gpu:
        raw["model"] |= {"dtype": "float32", "attention": _without_flash(recipe.model.attention)}
    for section, limits in LIMITS.items():
        if raw[section] is not None:
            raw[section] |= {k: min(raw[section][k], most) for k, most in limits.items() if raw[section][k] is not None}
    raw["data"] |= _data(recipe, say)
    raw["train"] |= {"num_epochs": None, "max_steps": STEPS, "global_batch_size": None}
    if raw["train"]["schedule"]["warmup_steps"] is not None:
        raw["train"]["schedule"]["warmup_steps"] = min(1, raw["train"]["schedule"]["warmup_steps"])
    for section in ("checkpoint", "evaluation"):
        if raw[section] is not None:
            raw[section]["every_steps"] = STEPS // 2
    raw["logging"] = {"every_steps": 1, "report_to": []}
    return RECIPES[recipe.method].model_validate(raw)


def _without_flash(attention: str) -> str:
    return "auto" if attention == "flash" else attention


def _path(base: str) -> str:
    return str(Path(base).resolve())


def _data(recipe: Recipe, say: Say) -> dict[str, Any]:
    """The keys of `data` that change: first rows of what is at hand, bundled rows for the rest."""
    sources = _at_hand(recipe.data.sources, say)
    if len(sources) < len(recipe.data.sources):
        folder = shipped("recipes") / "quickstart" / "data"
        sources += [Source(path=str(folder / f"{name}.jsonl"), max_rows=ROWS) for name in BUNDLED[recipe.method]]
    held = _at_hand(recipe.data.validation_sources, say)
    size = 0.1 if recipe.data.validation_size and not held else 0
    return {
        "sources": [source.model_dump(mode="json") for source in sources],
        "validation_sources": [source.model_dump(mode="json") for source in held],
        "validation_size": size,
    }


def _at_hand(sources: Iterable[Source], say: Say) -> list[Source]:
    """The sources whose rows are here, each cut down to its first rows."""
    here = []
    for source in sources:
        if is_local(source.path):
            expand(source.path)  # a wrong path is a mistake, not something to stand in for
        elif not is_cached(source):
            say(f"smoke: {source.path} is not at hand: bundled rows stand in")
            continue
        say(f"smoke: the first {ROWS} rows of {source.path}")
        here.append(source.model_copy(update={"max_rows": min(ROWS, source.max_rows or ROWS)}))
    return here


def _standin(model: ModelSection, chat: ChatSection, say: Say) -> str:
    """A folder with a tiny model like the base, with the base's tokenizer where that is at hand."""
    folder = base_at_hand(model.base, model.revision)
    config = find_config(model)
    if local_path(model.base).is_dir():
        check_complete(model)
        chat_tokenizer(model, chat)
    own = tokenizer_files(folder) if folder is not None else []
    tokens_of = folder if own and folder is not None else shipped("recipes") / "quickstart" / "base"
    files = own or tokenizer_files(tokens_of)
    bundled = find_config(ModelSection(base=str(shipped("recipes") / "quickstart" / "base")))
    assert bundled is not None
    vocabulary = (config or bundled)["vocab_size"] if own else bundled["vocab_size"]
    small = shrunk(config or {"model_type": FALLBACK, "tie_word_embeddings": True}, vocabulary)
    contents = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    def build(staging: Path) -> dict[str, Any]:
        for file in files:
            shutil.copyfile(file, staging / file.name)
        return {"architecture": build_standin(staging, small)}

    key = cache.key_of([small, contents, transformers.__version__])
    made, note, _ = cache.make("standins", key, build, lambda path, _: path)
    kind = note["architecture"] if config else f"{FALLBACK}, since its own architecture is not known here"
    if config and note["architecture"] != small["model_type"]:
        kind = f"{note['architecture']} instead of {small['model_type']}"
    tokens = "its own tokenizer" if own else "the bundled tokenizer"
    say(f"smoke: a tiny stand-in for {model.base} ({kind}; {tokens}; random weights)")
    return str(made)
