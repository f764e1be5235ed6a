"""Loading of base models, their hash, and `torch.compile` of decoder layers."""

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
from nesso_tune.hub import base_folder, check_model_folder, check_pinned
from nesso_tune.model.attention import choose_attention
from nesso_tune.model.flash import AttentionShape
from nesso_tune.model.forward import choose_forward_path
from nesso_tune.recipes.sections import ModelSection

DEFAULT_CONTEXT = 2048  # `max_length` of generation if the base does not state its context


def load_model(section: ModelSection, chat: ChatTokenizer, seed: int) -> PreTrainedModel:
    """Loads the base in float32, with an embedding row for every token of the chat tokenizer.

    The generation config gets the end tokens, and `forward_path(model)` says how the model trains. Weights are random
    only with `random_init`.

    Raises:
        ModelError: if weights are missing or damaged, or the model and the tokenizer do not fit.
        RecipeError: if the attention kernel cannot run on this machine or with this model.
    """
    where = f"model.base {section.base}"
    check_pinned(section)
    folder = base_folder(section.base, section.revision, weights=not section.random_init)
    check_model_folder(folder, section)
    config = _config(folder, section, where)
    transformers_logging.disable_progress_bar()
    kernel = choose_attention(section.attention, section.dtype, AttentionShape.of(config)).kernel
    try:
        model = _build(folder, section, where, config, "eager" if kernel == "eager" else "sdpa", seed)
    except _UnsupportedKernel:
        if section.attention != "auto":
            raise RecipeError(
                "model.attention", f"{section.base} does not support {kernel} attention",
                "set attention: auto or eager",
            ) from None  # fmt: skip
        model = _build(folder, section, where, config, "eager", seed)
    _fit_vocabulary(model, chat, section, where)
    _set_token_ids(model, chat, seed if section.random_init else None)
    path = choose_forward_path(model, kernel, where)
    model.generation_config = _generation_config(model, chat)
    if not path.padding_free and section.attention == "flash":
        raise RecipeError(
            "model.attention", f"{section.base} does not support document attention, which flash requires",
            "set attention: auto",
        )  # fmt: skip
    return model


def base_hash(section: ModelSection) -> str:
    """Identifies the base: SHA-256 of its configuration, its weights and, with `trust_remote_code`, its code.

    Raises:
        ModelError: if a file in the hub's cache differs from the file on the hub.
    """
    folder = base_folder(section.base, section.revision, weights=not section.random_init)
    digest = hashlib.sha256()
    code = folder.glob("*.py") if section.trust_remote_code else ()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *code]):
        with file.open("rb") as stream:
            file_digest = hashlib.file_digest(stream, "sha256")
        blob = file.resolve()  # the hub's cache names large files by their SHA-256
        is_named_by_hash = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) is not None
        if is_named_by_hash and blob.name != file_digest.hexdigest():
            raise ModelError(
                f"model.base {section.base}", f"{file.name} is damaged in the hub's cache",
                f"remove {blob} and download it again: `nesso-tune prepare`",
            )  # fmt: skip
        digest.update(file_digest.digest())
    return digest.hexdigest()[:16]


class _UnsupportedKernel(Exception):
    """The model's code does not support an attention kernel."""


def _config(folder: Path, section: ModelSection, where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # transformers raises many types for an invalid configuration
        raise ModelError(where, f"its config.json cannot be used ({first_line(error)})", "download it again") from None


def _build(folder: Path, section: ModelSection, where: str, config: Any, kernel: str, seed: int) -> PreTrainedModel:
    """The model with one attention kernel, with its own or with random weights."""
    options = {"attn_implementation": kernel, "dtype": torch.float32}
    if not section.random_init:
        return _pretrained(folder, section, where, options)
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **options)
    except Exception as error:  # the architecture's code raises any type for sizes that do not fit
        if "does not support" in str(error):
            raise _UnsupportedKernel from None
        raise ModelError(where, f"cannot be created ({first_line(error)})", "use another base") from None


def _pretrained(folder: Path, section: ModelSection, where: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # transformers and safetensors raise many types for a damaged file
        if "does not support" in str(error) and "attention" in str(error).lower():
            raise _UnsupportedKernel from None
        raise ModelError(where, f"cannot be loaded ({first_line(error)})", "download the model again") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            where, f"{len(missing)} weights are missing from its files (first: {missing[0]})",
            "download the model again",
        )  # fmt: skip
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.detach().sum()):
            raise ModelError(where, f"{name} contains NaN or infinity", "download the model again, or use another base")
    return model


def _fit_vocabulary(model: PreTrainedModel, chat: ChatTokenizer, section: ModelSection, where: str) -> None:
    """Resizes the embeddings to the tokenizer; rows without pre-training get the mean of the rows of related tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    base_size = min([chat.size, *chat.placed.added.values()])
    if base_size > rows:
        raise ModelError(
            where, f"the tokenizer has {base_size:,} tokens, the model {rows:,} embedding rows",
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


def _set_token_ids(model: PreTrainedModel, chat: ChatTokenizer, seed: int | None) -> None:
    """Sets the chat's token ids in the configuration, and removes `padding_idx`, whose row gets no gradient.

    The padding token is the end token, which is supervised. A model that computes with its padding id, for example to
    count positions, keeps it: otherwise `final/` would compute something else. `seed` is that of random weights:
    their padding row is zero, and is initialised too.
    """
    model.config.eos_token_id, model.config.bos_token_id = chat.eos_id, chat.bos_token_id
    if getattr(model.config, "output_router_logits", False):  # fails in the forward of a dense model without a router
        model.config.output_router_logits = False
    if not any(_reads_padding_idx(m) for m in model.modules() if not isinstance(m, nn.Embedding)):
        model.config.pad_token_id = None if _zeroes_padding_on_load(model) else chat.pad_id
    for module in model.modules():
        if isinstance(module, nn.Embedding) and (
            type(module).forward is nn.Embedding.forward or not _reads_padding_idx(module)
        ):
            if seed is not None and module.padding_idx is not None:
                _fill_zero_row(module.weight, module.padding_idx, seed)
            module.padding_idx = None


@torch.no_grad()
def _zeroes_padding_on_load(model: PreTrainedModel) -> bool:
    """Whether transformers zeroes the padding row of this architecture on loading, whatever its files contain.

    Then `final/` must not name a padding token in config.json; its generation config and tokenizer do.
    """
    embeddings = model.get_input_embeddings()
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and embeddings in part.modules()]
    table = nn.Embedding(2, 1, padding_idx=1)
    table.weight.fill_(1.0)
    table.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # as every weight loaded from a file
    try:
        parts[-1]._init_weights(table)  # the innermost, as transformers initialises; it may read its own attributes
    except Exception:  # code of an architecture that expects its own modules
        return False
    return not table.weight[1].any()


def _fill_zero_row(table: Tensor, row: int, seed: int) -> None:
    """Initialises a padding row of zeros like the other rows: the gradient of a norm of zeros is unbounded."""
    with torch.no_grad():
        if table[row].any():
            return
        generator = torch.Generator().manual_seed(seed)
        table[row] = float(table.std()) * torch.randn(table.shape[1], generator=generator)


def _reads_padding_idx(module: nn.Module) -> bool:
    """Whether a method of the module's class, other than `__init__`, uses `padding_idx`."""
    methods = {name: method for name, method in vars(type(module)).items() if name != "__init__"}
    codes = (getattr(method, "__code__", _reads_padding_idx.__code__) for method in methods.values())
    return any("padding_idx" in code.co_names for code in codes)


def _generation_config(model: PreTrainedModel, chat: ChatTokenizer) -> GenerationConfig:
    """Stops at the template's end token, at the base's own end tokens, and at the end of the context.

    `max_new_tokens` is not set: inference servers and evaluations would use it as an upper limit.
    """
    base = model.generation_config.eos_token_id if model.generation_config else None
    base_ends = base if isinstance(base, list) else [base]
    ends = [chat.eos_id, *(token for token in base_ends if token is not None and token != chat.eos_id)]
    context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends,
        pad_token_id=chat.pad_id,
        do_sample=False,
        max_length=context,
    )


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every decoder layer of a model in place, with static shapes.

    Compiled code depends only on the software and the machine, so a resumed run rounds as the first one.

    Raises:
        RunEnvironmentError: if there is no C++ compiler.
    """
    if (missing := _missing_compiler()) is not None:
        raise RunEnvironmentError("train.torch_compile", missing, "install one, or set torch_compile: false")
    layer_classes = set(model._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            module.compile(dynamic=False)


def can_compile() -> bool:
    """Whether `torch.compile` works on this machine."""
    return _missing_compiler() is None


def _missing_compiler() -> str | None:
    if torch.cuda.is_available():
        return None  # torch installs Triton
    compilers = ("g++", "clang++", "c++")
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is installed ({', '.join(compilers)})"


@contextmanager
def not_compiled() -> Iterator[None]:
    """Runs compiled layers eagerly, for example in evaluation, whose rows have other lengths."""
    with torch.compiler.set_stance("force_eager"):
        yield
