"""Exports that are folders: a complete model, an adapter for peft, and a model of MLX for Apple silicon.

MLX is converted and checked by `mlx-lm` (extra `mlx`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.errors import ModelError, first_line
from nesso_tune.export.exporter import Format, copy_tokenizer
from nesso_tune.export.final_folder import adapted_base, save_model
from nesso_tune.export.parity import Prompt, Runtime, TransformersRuntime, round_modules, round_weights
from nesso_tune.export.weights import FinishedRun, check_checkpoint
from nesso_tune.files import remove
from nesso_tune.hub import ADAPTER_CONFIG, base_folder
from nesso_tune.logs import logger
from nesso_tune.model.adapters import fake_quantise
from nesso_tune.recipes.builtin import local_path
from nesso_tune.training.checkpoint import load_weights
from nesso_tune.training.state_dict import get_weights


def _write_model(run: FinishedRun, model: PreTrainedModel, folder: Path, dtype: str) -> None:
    save_model(get_weights(model), model, folder, dtype)
    copy_tokenizer(run, folder)


def _check_adapter(run: FinishedRun) -> None:
    if run.recipe.model.adapter is None:
        raise ModelError("--to adapter", "the run trained all weights, without an adapter", "use --to hf")
    if run.recipe.model.random_init:
        raise ModelError("--to adapter", "the base has random weights, which no file contains", "use --to hf")
    check_checkpoint(run.final_checkpoint)


def _write_adapter(run: FinishedRun, model: PreTrainedModel, folder: Path, dtype: str) -> None:
    section = run.recipe.model
    chat = chat_tokenizer(section, run.recipe.chat)
    base, adapted = adapted_base(section, chat, run.recipe.seed)
    load_weights(run.final_checkpoint, base)
    folder_of_base = local_path(section.base)  # absolute: peft looks for a relative one from where it runs
    name = str(folder_of_base.resolve()) if folder_of_base.is_dir() else section.base
    for config in adapted.peft_config.values():
        config.base_model_name_or_path, config.revision = name, section.revision
    adapted.save_pretrained(folder, save_embedding_layers=False)  # trained rows of new tokens are part of the adapter
    (folder / "README.md").unlink(missing_ok=True)  # of peft
    copy_tokenizer(run, folder)
    if section.adapter is not None and section.adapter.type == "qlora":
        logger.warning("adapter: it was trained on the base in 4 bits (NF4, double quantisation): load the base so")


def _adapter_runtime(run: FinishedRun, folder: Path) -> Runtime:
    """peft on the base that the folder names, with rows for new tokens; quantised as in training."""
    section, named = run.recipe.model, PeftConfig.from_pretrained(folder)
    name = str(named.base_model_name_or_path)
    if local_path(name).exists() and not Path(name).is_absolute():
        what = f"{ADAPTER_CONFIG} names its base by the relative path {name}"
        raise ModelError("--to adapter", what, "report it: the adapter would load in this directory only")
    base = AutoModelForCausalLM.from_pretrained(base_folder(name, named.revision, weights=True), dtype=torch.float32)
    size = chat_tokenizer(section, run.recipe.chat).size
    if size > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(size, mean_resizing=False)
    if section.adapter is not None and section.adapter.type == "qlora":
        fake_quantise(base, getattr(torch, section.dtype))
    base.generation_config = type(base.generation_config).from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, folder)
    return TransformersRuntime(folder, adapted.merge_and_unload().eval())


HF = Format(
    name="hf",
    dtypes=("float32", "bfloat16", "float16"),
    check=lambda run: None,
    write=_write_model,
    round=round_weights,
    runtime=lambda run, folder: TransformersRuntime(folder),
)
ADAPTER = Format(
    name="adapter",
    dtypes=(),
    check=_check_adapter,
    write=_write_adapter,
    round=round_weights,
    runtime=_adapter_runtime,
)


def _check_mlx(run: FinishedRun) -> None:
    model_type = AutoConfig.from_pretrained(run.final).model_type
    if find_spec(f"mlx_lm.models.{model_type}") is None:
        raise ModelError("--to mlx", f"mlx-lm {version('mlx-lm')} has no architecture {model_type}", "export --to hf")


def _write_mlx(run: FinishedRun, model: PreTrainedModel, folder: Path, dtype: str) -> None:
    from mlx_lm import convert

    source, target = folder / "hf", folder / "mlx"
    source.mkdir()
    HF.write(run, model, source, dtype)
    try:
        with redirect_stdout(StringIO()):
            convert(str(source), str(target), dtype=dtype)
    except ValueError as error:  # weights or settings that mlx-lm's code of the architecture does not know
        raise ModelError("--to mlx", f"mlx-lm cannot convert it ({first_line(error)})", "export --to hf") from None
    remove(source)
    (target / "README.md").unlink(missing_ok=True)
    for file in target.iterdir():
        file.rename(folder / file.name)
    target.rmdir()
    copy_tokenizer(run, folder)


class MlxRuntime:
    """The folder in `mlx-lm`: on the GPU of a Mac, on the CPU elsewhere."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm import load

        self.name = f"mlx-lm {version('mlx-lm')}"
        self._model, self._tokenizer = load(str(folder))[:2]
        self._cache: list[Any] = []
        self._cached: list[int] = []  # ids whose keys and values are in the cache

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See `Runtime`."""
        ids = self._tokenizer.apply_chat_template(
            prompt.messages, tools=prompt.tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [int(token) for token in ids]

    def likeliest(self, prompt_ids: Sequence[int], answer: Sequence[int]) -> list[int]:
        """See `Runtime`."""
        import mlx.core as mx

        ids = [*prompt_ids, *answer[:-1]]
        known = self._keep_common_prefix(ids, len(prompt_ids) - 1)
        logits = self._model(mx.array([ids[known:]]), cache=self._cache)[0, len(prompt_ids) - 1 - known :]
        self._cached = ids
        found: Any = mx.argmax(logits, axis=-1).tolist()
        return [int(token) for token in found]

    def _keep_common_prefix(self, ids: list[int], most: int) -> int:
        """Cuts the key-value cache to the first tokens that it shares with `ids`; returns their number."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        pairs = zip(self._cached, ids, strict=False)
        common = min(most, next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._cached), len(ids))))
        if common and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, len(self._cached) - common)
            return common
        self._cache = make_prompt_cache(self._model)
        return 0


MLX = Format(
    name="mlx",
    dtypes=("float32", "bfloat16", "float16"),
    check=_check_mlx,
    write=_write_mlx,
    round=round_modules,  # MLX computes everything in the precision of the weights
    runtime=lambda run, folder: MlxRuntime(folder),
    copies=2,
)
