"""What a run is made of and where it runs: recorded, and compared when it is continued."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from nesso_tune.cache import key_of
from nesso_tune.data.prepare import PreparedData
from nesso_tune.data.privacy import Privacy
from nesso_tune.errors import Problem, RecipeError
from nesso_tune.model.loading import base_hash
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.builtin import path_keys
from nesso_tune.recipes.schema import Recipe, dump
from nesso_tune.recipes.secrets import masked_word

Changes = Mapping[str, tuple[Any, Any]]  # of keys of the recipe, with both values
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers")
# What a run is made of: it is not continued with another, whatever is allowed.
MADE_OF = {
    "data": "the data", "tokenizer": "the tokenizer or template", "base": "the base model's weights",
    "global_batch": "the global batch",
}  # fmt: skip
IDENTITY = 2  # how `data` is computed: since 2 from what is trained on, before from where it was read too
CHOSEN_BY = {"data": ("data.",), "tokenizer": ("chat.", "model."), "base": ("model.",)}  # sections of the recipe
# Where it runs: it is continued elsewhere too, but rounds otherwise, so no longer to the bit.
RUNS_ON = {
    "world_size": "processes", "threads": "CPU threads", "device": "device", "attention": "attention",
    "torch_compile": "compiled layers", "python": "Python", "versions": "", "nesso_tune": "nesso-tune",
}  # fmt: skip


def run_facts(recipe: Recipe, data: PreparedData, plan: Plan, attention: str = "") -> dict[str, Any]:
    """What the manifests of a run and of its checkpoints record; `attention` is what the model computes it with."""
    base = base_hash(recipe.model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "nesso_tune": version("nesso-tune"),
        "versions": {name: version(name) for name in (*PACKAGES, *_quantiser(recipe))},
        "python": platform.python_version(),
        "base": base,
        "tokenizer": data.chat.fingerprint,
        "data": data.report.fingerprint,
        "identity": IDENTITY,
        "start": f"{base}-{data.chat.fingerprint}-{data.report.fingerprint}",
        "recipe_hash": key_of(dump(recipe)),
        "world_size": plan.processes,
        "global_batch": plan.global_batch,
        "threads": torch.get_num_threads(),
        "device": gpu,
        "attention": attention,
        "unpacked": data.report.packing.unpacked,  # the base cannot keep packed documents apart
        "torch_compile": plan.torch_compile,
        "command": _command(Privacy(recipe.data)),
    }


def _command(privacy: Privacy) -> list[str]:
    """The words that started this, without secrets and without what is private."""
    words = [word.encode("utf-8", "backslashreplace").decode() for word in sys.argv]
    return privacy.shown_command([masked_word(word) for word in words])


def _quantiser(recipe: Recipe) -> tuple[str, ...]:
    """What makes a base's 4 bits, where there are any."""
    adapter = recipe.model.adapter
    return ("bitsandbytes",) if adapter is not None and adapter.type == "qlora" else ()


def check_same_run(
    run: Path, noted: Mapping[str, Any], facts: Mapping[str, Any], finished: bool, moved: Changes = MappingProxyType({})
) -> None:
    """Refuses other data, another tokenizer, base or global batch than a manifest notes.

    A finished model does not depend on the global batch with which it would be continued.

    Args:
        run: the run directory.
        noted, facts: what its manifest says, and what is so now.
        finished: whether the run is.
        moved: keys of the recipe that name other files than the run was begun with, with both values.

    Raises:
        RecipeError: with each difference and both its values.
    """
    names = [name for name in MADE_OF if not (finished and name == "global_batch")]
    changed = [name for name in names if noted.get(name) != facts[name]]
    if changed:
        raise RecipeError(_problem(run, name, noted, facts[name], moved) for name in changed)


def _problem(run: Path, name: str, noted: Mapping[str, Any], now: Any, moved: Changes) -> Problem:
    if name == "data" and noted.get("identity") != IDENTITY:
        what = f"was begun by an earlier nesso-tune ({noted.get('nesso_tune')}), whose data cannot be compared"
        return Problem(str(run), what, "continue it with that version, or start anew with --overwrite")
    keys = {key: pair for key, pair in moved.items() if key.startswith(CHOSEN_BY.get(name, ()))}
    said = "".join(f"; {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, (old, new) in keys.items())
    remedy = f"name what it began with in {', '.join(keys)}" if keys else "undo the change"
    return Problem(
        str(run), f"{MADE_OF[name]} changed ({noted.get(name)} -> {now}{said})",
        f"{remedy}, or start anew with --overwrite or another output_dir",
    )  # fmt: skip


def names_content(key: str, values: tuple[Any, Any], recipe: Recipe) -> bool:
    """Whether a key only says where content is, or what it is called: the content itself is compared later."""
    names = tuple(part for part in key.split(".") if not part.isdigit())
    if names[:3] == ("data", "mixture", "shares"):  # a share may have its source's path for a name
        return None in values
    return names in path_keys(type(recipe)) or names == ("model", "revision") or names[-1] == "alias"


def moved_in_words(moved: Changes) -> list[str]:
    """What is said of files that lie elsewhere now; names of data may be private, so they are not said."""
    kinds = {"model.": "the base", "chat.": "the template"}
    keys: dict[str, list[str]] = {}
    for key in moved:
        kind = next((said for section, said in kinds.items() if key.startswith(section)), "the data")
        keys.setdefault(kind, []).append(key)
    return [f"{kind} is named otherwise ({', '.join(keys[kind])}), but has the same content" for kind in keys]


def other_environment(noted: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{what: before and now} of where the run is continued, as far as it may round otherwise there."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, called in RUNS_ON.items():
        before, now = noted.get(name), facts[name]
        pairs = {called: (before, now)}
        if isinstance(now, Mapping):
            old = before if isinstance(before, Mapping) else {}
            pairs = {each: (old.get(each), now[each]) for each in now}
        found |= {each: pair for each, pair in pairs.items() if pair[0] != pair[1]}
    return found
