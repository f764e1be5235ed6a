"""Objects that are passed to `train` in place of the recipe's base and sources: written into the cache by content.

A run then has a base and data that its manifest identifies, that a later process finds again to resume or to export
it, and that every rank loads in the same way. The objects themselves are not changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from nesso_tune import cache
from nesso_tune.data.sources import passed_source
from nesso_tune.errors import ModelError, first_line
from nesso_tune.files import sha256
from nesso_tune.hub import base_folder, tokenizer_files
from nesso_tune.model.loading import base_hash
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ModelSection

CACHE_KIND = "passed-models"
BASE_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
CHECKED_TOKENS = 8
MAX_DIFFERENCE = 0.02  # of logits, relative to the largest: rounding of bfloat16 and of other attention kernels


def with_passed(
    recipe: Recipe,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None,
) -> Recipe:
    """The recipe with what was passed to `train` in place of its base and its sources.

    Raises:
        ModelError, DataError: if an object cannot be used.
        RecipeError: if other keys of the recipe do not fit it, e.g. shares of sources that are replaced.
    """
    changes: dict[str, Any] = {}
    if model is not None or tokenizer is not None:
        changes |= {"model.base": str(_passed_base(recipe.model, model, tokenizer)), "model.revision": None}
    if model is not None:
        changes["model.random_init"] = False
    data = recipe.data
    if train_dataset is not None:
        changes["data.sources"] = [passed_source(train_dataset, "train_dataset", data.sources)]
    if eval_dataset is not None:
        replaced = data.validation_sources or data.sources
        changes["data.validation_sources"] = [passed_source(eval_dataset, "eval_dataset", replaced)]
        changes["data.validation_size"] = type(data).model_fields["validation_size"].default  # it has no effect
    return recipe.replace(changes) if changes else recipe


def _passed_base(
    section: ModelSection, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Path:
    """The base folder of a passed model and tokenizer. What is not passed is that of the recipe's base.

    Raises:
        ModelError: if the model cannot be rebuilt from its files: it is no transformers model, has frozen or quantized
            weights, or computes something else than the class that its configuration names.
    """
    _check_types(model, tokenizer)
    transformers_logging.disable_progress_bar()
    with TemporaryDirectory() as temporary:
        tokens = Path(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(tokens)
        else:
            for file in tokenizer_files(base_folder(section.base, section.revision)):
                shutil.copyfile(file, tokens / file.name)
        content = base_hash(section) if model is None else _model_hash(model)
        key = cache.key_of([content, {file.name: sha256(file) for file in sorted(tokens.iterdir())}])

        def build(staging: Path) -> dict[str, Any]:
            if model is None:
                _link_base(section, staging)
            else:
                _save(model, staging)
            shutil.copytree(tokens, staging, dirs_exist_ok=True)
            return {}

        folder, _, _ = cache.get_or_build(CACHE_KIND, key, build, lambda path, _: path, "the passed model")
    if model is not None:
        _check_rebuilt(model, folder)
    return folder


def _check_types(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        what = f"is a {type(tokenizer).__name__}, not a tokenizer of transformers"
        raise ModelError("tokenizer", what, "wrap it: transformers.PreTrainedTokenizerFast(tokenizer_object=…)")
    if model is None:
        return
    if not isinstance(model, PreTrainedModel):
        remedy = "pass its base, merged if it has trained adapters, and set model.adapter in the recipe"
        raise ModelError("model", f"is a {type(model).__name__}, not a PreTrainedModel of transformers", remedy)
    if getattr(model, "is_quantized", False):
        remedy = "pass the model as it was before, and set model.adapter.type: qlora in the recipe"
        raise ModelError("model", "has quantized weights", remedy)
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError("model", "has weights that are not loaded (on the meta device)", "load it without device_map")
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    if frozen:
        what = f"{len(frozen)} of its weights are frozen (first: {frozen[0]}), but all weights are trained"
        raise ModelError("model", what, "set requires_grad, or train an adapter (model.adapter in the recipe)")


def _model_hash(model: PreTrainedModel) -> str:
    """SHA-256 of the configuration and of all tensors."""
    digest = hashlib.sha256(json.dumps(_config(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """Its configuration without the version of transformers, which decides nothing."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("transformers_version", None)  # the hash of the base would depend on it
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link_base(section: ModelSection, folder: Path) -> None:
    """Links to the weights of the recipe's base, and copies of its other files."""
    base = base_folder(section.base, section.revision, weights=not section.random_init)
    for file in (file for pattern in BASE_FILES for file in base.glob(pattern)):
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, folder / file.name)


@torch.no_grad()
def _check_rebuilt(model: PreTrainedModel, folder: Path) -> None:
    """Raises ModelError if the files of the model do not give the same model again."""
    where, kernel = "model", getattr(model.config, "_attn_implementation", None)
    remedy = "register its configuration and class with AutoConfig and AutoModelForCausalLM"
    try:
        rebuilt = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, attn_implementation=kernel)
    except Exception as error:  # transformers raises many types
        raise ModelError(where, f"cannot be loaded from its files ({first_line(error)})", remedy) from None
    if type(rebuilt) is not type(model):
        what = f"is a {type(model).__name__}, but its files are loaded as {type(rebuilt).__name__}"
        raise ModelError(where, what, remedy)
    differing = _differing_weights(model.state_dict(), rebuilt.state_dict())
    if differing:
        what = f"{len(differing)} of its weights are lost when it is saved (first: {differing[0]})"
        raise ModelError(where, what, "define them in a class of its own, and register it")
    ids = torch.arange(min(CHECKED_TOKENS, model.config.get_text_config().vocab_size), device=model.device)[None]
    was_training = model.training
    expected, found = (each.eval()(input_ids=ids).logits.float() for each in (model, rebuilt.to(model.device)))
    model.train(was_training)
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-9))
    if not difference <= MAX_DIFFERENCE:
        what = f"computes other logits than its class {type(model).__name__} (by up to {difference:.0%})"
        raise ModelError(where, what, "remove its hooks, or write the changed forward as a class and register it")


def _differing_weights(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    names = sorted({*before, *after})
    return [
        name
        for name in names
        if name not in before or name not in after or not torch.equal(before[name].cpu(), after[name].cpu())
    ]
