"""A tiny stand-in for a base model: the same architecture, two thin layers, random weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from nesso_tune import cache
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data.files import expand, is_local
from nesso_tune.data.sources import is_cached
from nesso_tune.errors import ModelError, RunEnvironmentError
from nesso_tune.hub import base_at_hand, check_at_hand, tokenizer_files, unknown_base
from nesso_tune.metrics import overall_metric
from nesso_tune.planning.shapes import find_config, unsupported
from nesso_tune.recipes.builtin import BUNDLED_TOKENS, bundled_base, local_path, shipped
from nesso_tune.recipes.schema import RECIPES, Recipe, dump
from nesso_tune.recipes.sections import ChatSection, ModelSection, Source
from nesso_tune.runs.checkpoint import MANIFEST
from nesso_tune.runs.layout import ASIDE, MOVING

HIDDEN, HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 16, 128, 2
FALLBACK = "llama"  # stands in for an architecture that transformers does not know by itself
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "sliding_window_pattern")  # one entry a layer
FITTING = ("pad_token_id", "bos_token_id", "eos_token_id")  # ids that may lie beyond a small vocabulary
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")  # fmt: skip
DROPPED = ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version",
           "rope_scaling", "architectures")  # fmt: skip


def shrunk(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The configuration of a model like that of `config`, but tiny, with `vocabulary` rows.

    Heads keep whether they are grouped, embeddings whether they are tied; a rope that is scaled for long contexts is
    left plain, since its factors belong to the size of the heads.
    """
    heads, groups = config.get("num_attention_heads") or 1, config.get("num_key_value_heads")
    small = {key: value for key, value in config.items() if key not in DROPPED}
    small |= {
        "model_type": config.get("model_type", FALLBACK),
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if groups in (None, heads) else HEADS // 2,
        "head_dim": HEAD_DIM,
        "initializer_range": HIDDEN**-0.5,
        "max_window_layers": LAYERS,
    }
    for key in FITTING:
        if isinstance(small.get(key), int) and small[key] >= vocabulary:
            small[key] = None
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and any(isinstance(value, (list, dict)) for value in rope.values()):
        small.pop("rope_parameters")
    for key in LISTS:
        if isinstance(small.get(key), list):
            small[key] = small[key][:LAYERS]
    return small


def build_standin(folder: Path, config: dict[str, Any], seed: int = 0) -> str:
    """Writes weights and config.json of a model of this (tiny) configuration into a folder.

    Returns:
        The architecture it has: that of `config`, or Llama where transformers cannot make that one.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception:  # an architecture of its own code, or one with more to it than sizes
        plain = {key: value for key, value in config.items() if key in SIZES} | {"model_type": FALLBACK}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    model.save_pretrained(folder)
    return str(model.config.model_type)


Say = Callable[[str], None]
STEPS, LENGTH, LOWEST = 4, 4096, -1e300
ROWS = {"sft": 200, "dpo": 40}  # of each source; every pair is scored once before the first step
SEARCHED = 5000  # rows among which those that `where` asks for are looked for
KIND = "standins"  # their place in the cache
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
        RunEnvironmentError: if a real run lies where the smoke run would be.
    """
    raw, output = dump(recipe), f"{os.path.normpath(recipe.output_dir)}-smoke"
    _check_free(Path(output))
    base, own_tokenizer = made.get(_path(recipe.model.base)), True
    if base is None:
        base, own_tokenizer = _standin(recipe.model, recipe.chat, say)
    made[_path(f"{recipe.output_dir}/final")] = f"{output}/final"
    raw["output_dir"] = output
    raw["model"] |= {"base": base, "revision": None, "random_init": False, "trust_remote_code": False}
    if not torch.cuda.is_available():
        raw["model"] |= {"dtype": "float32", "attention": _without_flash(recipe.model.attention)}
    if not own_tokenizer:  # the bundled one has not its tokens
        raw["chat"]["pad_token"] = None
        raw["data"]["sequence_len"] *= BUNDLED_TOKENS
    for section, limits in LIMITS.items():
        if raw[section] is not None:
            raw[section] |= {k: min(raw[section][k], most) for k, most in limits.items() if raw[section][k] is not None}
    if recipe.data.too_long == "error":
        raw["data"]["too_long"] = "drop"  # the length is another one
    raw["data"] |= _data(recipe, say)
    raw["train"] |= {"num_epochs": None, "max_steps": STEPS, "global_batch_size": None}
    if recipe.train.best_metric is not None:  # a language, or a source, may not be among the first rows
        raw["train"]["best_metric"] = overall_metric(recipe.train.best_metric)
    _shorten_schedule(raw["train"]["schedule"])
    for section in ("checkpoint", "evaluation"):
        if raw[section] is not None:
            raw[section]["every_steps"] = STEPS // 2
    raw["logging"] = {"every_steps": 1, "report_to": []}
    longer = "" if own_tokenizer else " (the bundled tokenizer makes about twice as many)"
    say(f"smoke: {STEPS} steps, rows of at most {raw['data']['sequence_len']} tokens{longer}, into {output}")
    return RECIPES[recipe.method].model_validate(raw)


def _check_free(output: Path) -> None:
    """Raises RunEnvironmentError if a folder holds a run that is no smoke run: its base would be a stand-in."""
    for folder in (output, output / ASIDE, output / MOVING):
        try:
            noted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            base = noted["recipe"]["model"]["base"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not base.endswith("-smoke/final") and Path(base).parent != cache.cache_root() / KIND:
            raise RunEnvironmentError(
                str(output), "holds a run that is no smoke run", "give that run, or this one, another output_dir"
            )


def _shorten_schedule(schedule: dict[str, Any]) -> None:
    """Makes a warm-up in steps fit before the decay of a run of a few steps has ended."""
    if schedule["warmup_steps"]:
        schedule["warmup_steps"] = 1 if (schedule["constant_ratio"] or 1) * STEPS > 1 else 0


def _without_flash(attention: str) -> str:
    return "auto" if attention == "flash" else attention


def _path(base: str) -> str:
    return str(Path(base).resolve())


def _data(recipe: Recipe, say: Say) -> dict[str, Any]:
    """The keys of `data` that change: first rows of what is at hand, bundled rows for the rest."""
    sources = _at_hand(recipe.data.sources, recipe.method, say)
    if len(sources) < len(recipe.data.sources):
        folder = shipped("recipes") / "quickstart" / "data"
        sources += [
            Source(path=str(folder / f"{name}.jsonl"), max_rows=ROWS[recipe.method]) for name in BUNDLED[recipe.method]
        ]
    held = _at_hand(recipe.data.validation_sources, recipe.method, say)
    size = 0.1 if recipe.data.validation_size and not held else 0
    return {
        "sources": [source.model_dump(mode="json") for source in sources],
        "validation_sources": [source.model_dump(mode="json") for source in held],
        "validation_size": size,
        # what is asked of the whole data says nothing of its first rows
        "mixture": None,
        "clean": {**recipe.data.clean.model_dump(mode="json"), "validation_overlap": "keep"},
        **({"preferences": {}} if recipe.method == "dpo" else {}),
    }


def _at_hand(sources: Iterable[Source], method: str, say: Say) -> list[Source]:
    """The sources whose rows are here, each cut down to its first rows."""
    here = []
    for source in sources:
        if is_local(source.path):
            expand(source.path)  # a wrong path is a mistake, not something to stand in for
        elif not is_cached(source):
            say(f"smoke: {source.path} is not at hand: bundled rows stand in")
            continue
        most = SEARCHED if source.where else ROWS[method]
        rows = min(most, source.max_rows or most)
        say(f"smoke: the first {rows} rows of {source.path}")
        # files may be sorted by score; that it is a number is still checked
        least = None if source.score_field is None else LOWEST
        changes: dict[str, Any] = {"max_rows": rows, "weight": 1.0, "min_score": least, "rules": {}}
        here.append(source.model_copy(update=changes))
    return here


def _standin(model: ModelSection, chat: ChatSection, say: Say) -> tuple[str, bool]:
    """A folder with a tiny model like the base, and whether the base's own tokenizer was at hand for it."""
    check_at_hand(model)
    folder = base_at_hand(model.base, model.revision)
    config = find_config(model)
    if config is not None and (reason := unsupported(config)) is not None:
        raise ModelError(f"model.base {model.base}", reason, "use another base")
    if local_path(model.base).is_dir():
        chat_tokenizer(model, chat)
    elif config is None and (note := unknown_base(model.base)):
        say(f"smoke: {note}")
    bundled = ModelSection(base=bundled_base())
    own = tokenizer_files(folder) if folder is not None else []
    files = own or tokenizer_files(Path(bundled.base))
    counted = (model if own else bundled).model_copy(update={"random_init": True})  # whatever its template
    rows = chat_tokenizer(counted, ChatSection()).backend.get_vocab_size()
    small = shrunk(
        config or {"tie_word_embeddings": True}, max(rows, (config or {}).get("vocab_size", 0) if own else 0)
    )
    contents = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    def build(staging: Path) -> dict[str, Any]:
        for file in files:
            shutil.copyfile(file, staging / file.name)
        return {"architecture": build_standin(staging, small)}

    key = cache.key_of([KIND, 2, small, contents, transformers.__version__])
    made, noted, _ = cache.make(KIND, key, build, lambda path, _: path, "the stand-in")
    kind = noted["architecture"] if config else f"{FALLBACK}, since its own architecture is not known here"
    if config and noted["architecture"] != small["model_type"]:
        kind = f"{noted['architecture']} instead of {small['model_type']}"
    tokens = "its own tokenizer" if own else "the bundled tokenizer"
    say(f"smoke: a tiny stand-in for {model.base} ({kind}; {tokens}; random weights)")
    return str(made), bool(own)
