"""Smoke runs: `--smoke` runs a recipe end to end in a few steps, with a tiny model in place of the base.

The tiny model has the architecture of the base, two narrow layers and random weights. Data that is not available
offline is replaced by bundled rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
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
from nesso_tune.hub import check_local_base, local_base_folder, missing_base_note, tokenizer_files
from nesso_tune.logs import logger
from nesso_tune.metric_registry import overall_metric
from nesso_tune.planning.shapes import find_config, unsupported
from nesso_tune.recipes.builtin import BUNDLED_TOKENS_RATIO, bundled_base, local_path, shipped_folder
from nesso_tune.recipes.schema import RECIPES, Recipe, dump
from nesso_tune.recipes.sections import ChatSection, ModelSection, PreferenceSection, Source
from nesso_tune.runs.checkpoint import MANIFEST
from nesso_tune.runs.layout import MOVING, OVERWRITTEN

STEPS = 4
MAX_SEQUENCE_LEN = 4096
ROWS_PER_SOURCE = {"sft": 200, "dpo": 40}  # the reference scores every pair before the first step
ROWS_SEARCHED = 5000  # in which rows that match `where` are searched
LOWEST_SCORE = -1e300  # replaces `min_score`: files may be sorted by score, but scores must still be numbers
BUNDLED_ROWS = {"sft": ("conversations", "toolcalls"), "dpo": ("pairs",)}  # files in recipes/quickstart/data/
LIMITS: dict[str, dict[str, Any]] = {  # upper limits of recipe keys
    "data": {"sequence_len": MAX_SEQUENCE_LEN},
    "train": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    "evaluation": {"samples": 4, "train_samples": 4, "max_new_tokens": 16},
    "checkpoint": {"keep": 2},
}

# the tiny model
CACHE_KIND = "standins"  # its folder in the cache
HIDDEN_SIZE, NUM_HEADS, HEAD_DIM, INTERMEDIATE_SIZE, NUM_LAYERS = 64, 4, 16, 128, 2
FALLBACK_ARCHITECTURE = "llama"  # for architectures that transformers does not include
FALLBACK_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "initializer_range", "tie_word_embeddings")  # fmt: skip
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers", "sliding_window_pattern")
TOKEN_ID_KEYS = ("pad_token_id", "bos_token_id", "eos_token_id")
DROPPED_KEYS = ("auto_map", "quantization_config", "torch_dtype", "dtype", "_name_or_path", "transformers_version",
                "rope_scaling", "architectures")  # fmt: skip


def smoke_recipe(recipe: Recipe, made: dict[str, str]) -> Recipe:
    """Reduces a recipe to a smoke run.

    Args:
        recipe: the recipe of the real run.
        made: maps the `final/` of earlier recipes of the same command to their smoke `final/`; this recipe is added.

    Raises:
        ModelError, DataError: if a local base or data file is invalid: the real run would fail too.
        RunEnvironmentError: if the output folder holds a real run.
    """
    raw, output = dump(recipe), f"{os.path.normpath(recipe.output_dir)}-smoke"
    _check_output(Path(output))
    base, own_tokenizer = made.get(_resolved(recipe.model.base)), True
    if base is None:
        base, own_tokenizer = _tiny_base(recipe.model, recipe.chat)
    made[_resolved(f"{recipe.output_dir}/final")] = f"{output}/final"
    raw["output_dir"] = output
    raw["model"] |= {"base": base, "revision": None, "random_init": False, "trust_remote_code": False}
    if not torch.cuda.is_available():
        attention = "auto" if recipe.model.attention == "flash" else recipe.model.attention
        raw["model"] |= {"dtype": "float32", "attention": attention}
    if not own_tokenizer:  # the bundled tokenizer lacks the base's tokens
        raw["chat"]["pad_token"] = None
        raw["data"]["sequence_len"] *= BUNDLED_TOKENS_RATIO
    for section, limits in LIMITS.items():
        if (values := raw[section]) is not None:
            values |= {
                key: limit if values[key] == "auto" else min(values[key], limit)
                for key, limit in limits.items() if values[key] is not None
            }  # fmt: skip
    if recipe.data.too_long == "error":
        raw["data"]["too_long"] = "drop"  # the maximum length is another one
    raw["data"] |= _data_keys(recipe)
    raw["train"] |= {"num_epochs": None, "max_steps": STEPS, "global_batch_size": None}
    if recipe.train.best_metric is not None:  # the first rows may lack a language or a source
        raw["train"]["best_metric"] = overall_metric(recipe.train.best_metric)
    _shorten_warmup(raw["train"]["schedule"])
    for section in ("checkpoint", "evaluation"):
        if raw[section] is not None:
            raw[section]["every_steps"] = STEPS // 2
    if raw["evaluation"] is not None:
        raw["evaluation"]["gate"] = None  # the weights are random
    raw["logging"] = {"every_steps": 1, "report_to": []}
    note = "" if own_tokenizer else " (the bundled tokenizer needs about twice as many)"
    logger.info(f"smoke: {STEPS} steps, rows of at most {raw['data']['sequence_len']} tokens{note}, output in {output}")
    return RECIPES[recipe.method].model_validate(raw)


def _check_output(output: Path) -> None:
    """Raises RunEnvironmentError if the output folder holds a real run."""
    for folder in (output, output / OVERWRITTEN, output / MOVING):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            base = manifest["recipe"]["model"]["base"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not base.endswith("-smoke/final") and Path(base).parent != cache.cache_root() / CACHE_KIND:
            raise RunEnvironmentError(
                str(output), "holds a run that is not a smoke run", "set another output_dir for one of the two runs"
            )


def _shorten_warmup(schedule: dict[str, Any]) -> None:
    """Makes a warm-up given in steps end before the decay."""
    if schedule["warmup_steps"]:
        schedule["warmup_steps"] = 1 if (schedule["constant_ratio"] or 1) * STEPS > 1 else 0


def _resolved(path: str) -> str:
    return str(Path(path).resolve())


def _data_keys(recipe: Recipe) -> dict[str, Any]:
    """The changed keys of `data`: the first rows of available sources, and bundled rows for the others."""
    sources = _available_sources(recipe.data.sources, recipe.method)
    if len(sources) < len(recipe.data.sources):
        folder = shipped_folder("recipes") / "quickstart" / "data"
        sources += [
            Source(path=str(folder / f"{name}.jsonl"), max_rows=ROWS_PER_SOURCE[recipe.method])
            for name in BUNDLED_ROWS[recipe.method]
        ]
    validation = _available_sources(recipe.data.validation_sources, recipe.method)
    return {
        "sources": [source.model_dump(mode="json") for source in sources],
        "validation_sources": [source.model_dump(mode="json") for source in validation],
        "validation_size": 0.1 if recipe.data.validation_size and not validation else 0,
        # checks of the whole data do not apply to its first rows
        "mixture": None,
        "clean": {**recipe.data.clean.model_dump(mode="json"), "validation_overlap": "keep"},
        **({"preferences": {key: {} for key in PreferenceSection.model_fields}} if recipe.method == "dpo" else {}),
    }


def _available_sources(sources: Iterable[Source], method: str) -> list[Source]:
    """The sources that are local or in the cache, each reduced to its first rows."""
    available = []
    for source in sources:
        if is_local(source.path):
            expand(source.path)  # raises for a wrong path, which is an error of the recipe
        elif not is_cached(source):
            logger.info(f"smoke: {source.path} is not available offline: using bundled rows instead")
            continue
        limit = ROWS_SEARCHED if source.where else ROWS_PER_SOURCE[method]
        rows = min(limit, source.max_rows or limit)
        logger.info(f"smoke: the first {rows} rows of {source.path}")
        min_score = None if source.score_field is None else LOWEST_SCORE
        changes: dict[str, Any] = {"max_rows": rows, "weight": 1.0, "min_score": min_score, "rules": {}}
        available.append(source.model_copy(update=changes))
    return available


def _tiny_base(model: ModelSection, chat: ChatSection) -> tuple[str, bool]:
    """A folder with a tiny model of the base's architecture, and whether it has the base's own tokenizer."""
    check_local_base(model)
    folder = local_base_folder(model.base, model.revision)
    config = find_config(model)
    if config is not None and (reason := unsupported(config)) is not None:
        raise ModelError(f"model.base {model.base}", reason, "use another base")
    if local_path(model.base).is_dir():
        chat_tokenizer(model, chat)
    elif config is None and (note := missing_base_note(model.base)):
        logger.info(f"smoke: {note}")
    bundled = ModelSection(base=bundled_base())
    own_files = tokenizer_files(folder) if folder is not None else []
    files = own_files or tokenizer_files(Path(bundled.base))
    section = (model if own_files else bundled).model_copy(update={"random_init": True})
    rows = chat_tokenizer(section, ChatSection()).backend.get_vocab_size()
    vocabulary = max(rows, (config or {}).get("vocab_size", 0) if own_files else 0)
    small = tiny_config(config or {"tie_word_embeddings": True}, vocabulary)
    contents = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]

    def build(staging: Path) -> dict[str, Any]:
        for file in files:
            shutil.copyfile(file, staging / file.name)
        return {"architecture": build_tiny_model(staging, small)}

    key = cache.key_of([CACHE_KIND, 2, small, contents, transformers.__version__])
    made, noted, _ = cache.get_or_build(CACHE_KIND, key, build, lambda path, _: path, "the tiny model")
    architecture = noted["architecture"]
    if not config:
        architecture = f"{FALLBACK_ARCHITECTURE}, because its own architecture is not known offline"
    elif architecture != small["model_type"]:
        architecture = f"{architecture} instead of {small['model_type']}"
    tokenizer = "its own tokenizer" if own_files else "the bundled tokenizer"
    logger.info(f"smoke: a tiny model in place of {model.base} ({architecture}; {tokenizer}; random weights)")
    return str(made), bool(own_files)


def tiny_config(config: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The configuration of a tiny model of the same architecture, with `vocabulary` rows.

    Grouped-query attention and tied embeddings are kept. RoPE scaling is dropped, because its factors depend on the
    head dimension.
    """
    heads, groups = config.get("num_attention_heads") or 1, config.get("num_key_value_heads")
    small = {key: value for key, value in config.items() if key not in DROPPED_KEYS}
    small |= {
        "model_type": config.get("model_type", FALLBACK_ARCHITECTURE),
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS if groups in (None, heads) else NUM_HEADS // 2,
        "head_dim": HEAD_DIM,
        "initializer_range": HIDDEN_SIZE**-0.5,
        "max_window_layers": NUM_LAYERS,
    }
    for key in TOKEN_ID_KEYS:
        if isinstance(small.get(key), int) and small[key] >= vocabulary:
            small[key] = None
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and any(isinstance(value, (list, dict)) for value in rope.values()):
        small.pop("rope_parameters")
    for key in PER_LAYER_KEYS:
        if isinstance(small.get(key), list):
            small[key] = small[key][:NUM_LAYERS]
    return small


def build_tiny_model(folder: Path, config: dict[str, Any], seed: int = 0) -> str:
    """Writes a model of a configuration from `tiny_config`, with random weights, into a folder.

    Returns:
        Its architecture: that of `config`, or Llama if transformers cannot build it.
    """
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception:  # needs remote code, or more than sizes
        plain = {key: value for key, value in config.items() if key in FALLBACK_KEYS}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain | {"model_type": FALLBACK_ARCHITECTURE}))
    model.save_pretrained(folder)
    return str(model.config.model_type)
