"""`torch.compile` of the decoder layers: the elementwise work between the matrix products becomes a few kernels."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError, first_line
from nesso_tune.hub import base_folder, check_complete, check_pinned
from nesso_tune.model.attention import choose_attention
from nesso_tune.model.forward import choose_forward_path
from nesso_tune.recipes.sections import ModelSection


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every decoder layer of a model in place, for rows of one constant length.

    What compiled code makes depends on software and machine alone, so that a resumed run rounds as the first did.

    Raises:
        RunEnvironmentError: if nothing can be compiled here.
    """
    if (lacking := _lacking()) is not None:
        raise RunEnvironmentError("train.torch_compile", lacking, "install it, or set torch_compile: false")
    blocks = set(model._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=False)


def can_compile() -> bool:
    """Whether this machine has what compiled code is built with."""
    return _lacking() is None


def _lacking() -> str | None:
    if torch.cuda.is_available():
        return None  # torch brings Triton along
    compilers = ("g++", "clang++", "c++")
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is installed ({', '.join(compilers)})"


@contextmanager
def not_compiled() -> Iterator[None]:
    """Layers compute as they are written: for rows of other lengths, and with other needs, than those of training."""
    with torch.compiler.set_stance("force_eager"):
        yield


UNSTATED_CONTEXT = 2048  # tokens that `generate` may reach with a base that states no context


def load_model(section: ModelSection, chat: ChatTokenizer, seed: int) -> PreTrainedModel:
    """The base in float32, with a row for every token and the end token in its generation config.

    Weights are random only if the recipe says `random_init`. How the model is trained is its `forward_path`.

    Raises:
        ModelError: if weights are missing, or model and tokenizer do not belong together.
        RecipeError: if the attention kernel cannot run here.
    """
    where = f"model.base {section.base}"
    check_pinned(section)
    folder = base_folder(section.base, section.revision, weights=not section.random_init)
    check_complete(folder, section)
    config = _config(folder, section, where)
    transformers_logging.disable_progress_bar()
    kernel = choose_attention(section.attention)
    try:
        model = _made(folder, section, where, config, "eager" if kernel == "eager" else "sdpa", seed)
    except _NoSuchKernel:
        if section.attention != "auto":
            raise RecipeError(
                "model.attention", f"{section.base} has no {kernel} attention", "set attention: auto or eager"
            ) from None
        model = _made(folder, section, where, config, "eager", seed)
    _fit_vocabulary(model, chat, section, where)
    _set_ids(model, chat, seed if section.random_init else None)
    path = choose_forward_path(model, kernel, where)
    model.generation_config = _generation_config(model, chat)
    if not path.padding_free and section.attention == "flash":
        raise RecipeError(
            "model.attention", f"{section.base} cannot attend document by document, which flash does here",
            "set attention: auto",
        )  # fmt: skip
    return model


class _NoSuchKernel(Exception):
    """The model's own code does not support an attention kernel."""


def _made(folder: Path, section: ModelSection, where: str, config: Any, kernel: str, seed: int) -> PreTrainedModel:
    """The model with one attention kernel, from its weights or from random ones."""
    options = {"attn_implementation": kernel, "dtype": torch.float32}
    if not section.random_init:
        return _pretrained(folder, section, where, options)
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **options)
    except Exception as error:  # whatever the architecture's code says of numbers that do not fit
        if "does not support" in str(error):
            raise _NoSuchKernel from None
        raise ModelError(where, f"cannot be made ({first_line(error)})", "use another base") from None


def base_hash(section: ModelSection) -> str:
    """Identifies the base: SHA-256 over its configuration and weight files, and its code if that is run.

    Raises:
        ModelError: for a file from the hub that is not what the hub has.
    """
    folder = base_folder(section.base, section.revision, weights=not section.random_init)
    digest = hashlib.sha256()
    code = folder.glob("*.py") if section.trust_remote_code else ()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *code]):
        with file.open("rb") as stream:
            own = hashlib.file_digest(stream, "sha256")
        stored = file.resolve()  # the hub's cache calls large files by their hash
        named = stored.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", stored.name) is not None
        if named and stored.name != own.hexdigest():
            what = f"{file.name} was damaged in the hub's cache"
            raise ModelError(
                f"model.base {section.base}", what, f"remove {stored} and fetch it again: `nesso-tune prepare`"
            )
        digest.update(own.digest())
    return digest.hexdigest()[:16]


def _config(folder: Path, section: ModelSection, where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # transformers and its data classes raise many kinds for a strange one
        raise ModelError(where, f"its config.json cannot be used ({first_line(error)})", "fetch it again") from None


def _pretrained(folder: Path, section: ModelSection, where: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged file
        if "does not support" in str(error) and "attention" in str(error).lower():
            raise _NoSuchKernel from None
        raise ModelError(where, f"cannot be loaded ({first_line(error)})", "fetch the model again") from None
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ModelError(
            where, f"{len(lacking)} weights are not in its files (first: {lacking[0]})", "fetch the model again"
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().sum()):
            raise ModelError(where, f"{name} holds NaN or infinity", "fetch the model again, or use another base")
    return model


def _fit_vocabulary(model: PreTrainedModel, chat: ChatTokenizer, section: ModelSection, where: str) -> None:
    """One row for each token; rows that pre-training never taught start from the mean of related tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    own_size = min([chat.size, *chat.placed.added.values()])
    if own_size > rows:
        raise ModelError(
            where, f"the tokenizer has {own_size:,} tokens, the model {rows:,} rows for them",
            "use the tokenizer that belongs to the model",
        )  # fmt: skip
    if chat.size > rows:
        model.resize_token_embeddings(chat.size, mean_resizing=False)
    if section.random_init:
        return
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tables[0]:
        tables.append(head.weight)
    with torch.no_grad():
        for token, related in chat.starts_from.items():
            for table in tables:
                table[token] = table[list(related)].mean(dim=0)


def _set_ids(model: PreTrainedModel, chat: ChatTokenizer, seed: int | None) -> None:
    """The chat's ids in the configuration, and no row of a table that gets no gradient.

    Padding is the end token here, which is learned. Where the model computes with the id of padding (it counts
    positions from it, say), it keeps its own, or `final/` would be another model. `seed` is that of random weights,
    whose row for padding is made of zeros.
    """
    model.config.eos_token_id, model.config.bos_token_id = chat.eos_id, chat.bos_token_id
    if getattr(model.config, "output_router_logits", False):  # a dense model has no router: its own forward would fail
        model.config.output_router_logits = False
    if not any(_reads_padding(m) for m in model.modules() if not isinstance(m, nn.Embedding)):
        model.config.pad_token_id = None if _zeroes_padding(model) else chat.pad_id
    for module in model.modules():
        if isinstance(module, nn.Embedding) and (
            type(module).forward is nn.Embedding.forward or not _reads_padding(module)
        ):
            if seed is not None and module.padding_idx is not None:
                _fill(module.weight, module.padding_idx, seed)
            module.padding_idx = None


@torch.no_grad()
def _zeroes_padding(model: PreTrainedModel) -> bool:
    """Whether transformers zeroes the row of padding of such a model when it loads it, whatever its files hold.

    `final/` would be another model then, so its config.json names no padding; generation config and tokenizer do.
    """
    table = nn.Embedding(2, 1, padding_idx=1)
    table.weight.fill_(1.0)
    table.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as every weight that a file holds
    model._init_weights(table)
    return not table.weight[1].any()


def _fill(table: Tensor, row: int, seed: int) -> None:
    """Gives a row that was initialised to zeros, because it was padding, values like those of its neighbours.

    Here its token may be learned, and a normalisation of zeros has an unbounded gradient.
    """
    with torch.no_grad():
        if table[row].any():
            return
        generator = torch.Generator().manual_seed(seed)
        table[row] = float(table.std()) * torch.randn(table.shape[1], generator=generator)


def _reads_padding(module: nn.Module) -> bool:
    """Whether a module's own code computes with the id of padding; that it keeps the id says nothing."""
    methods = {name: own for name, own in vars(type(module)).items() if name != "__init__"}
    return any("padding_idx" in getattr(own, "__code__", _reads_padding.__code__).co_names for own in methods.values())


def _generation_config(model: PreTrainedModel, chat: ChatTokenizer) -> GenerationConfig:
    """Stops at the template's end token, at the base's own, and where the context is full.

    There is no `max_new_tokens`: servers and evaluations take it for a ceiling, whatever they are asked for.
    """
    base = model.generation_config.eos_token_id if model.generation_config else None
    known = base if isinstance(base, list) else [base]
    ends = [chat.eos_id, *(token for token in known if token is not None and token != chat.eos_id)]
    context = getattr(model.config, "max_position_embeddings", None) or UNSTATED_CONTEXT
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends,
        pad_token_id=chat.pad_id,
        do_sample=False,
        max_length=context,
    )
