"""Loading of base models, their hash, and `torch.compile` of decoder layers."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nesso_tune.chat.tokenizer import ChatTokenizer
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError, closest, first_line
from nesso_tune.hub import base_folder, check_model_folder, check_pinned
from nesso_tune.model.attention import choose_attention
from nesso_tune.model.flash import AttentionShape
from nesso_tune.model.forward import choose_forward_path
from nesso_tune.recipes.sections import ModelSection

TINY_MODEL = 20_000_000  # parameters; below, several CPU threads cost more than they gain
DEFAULT_CONTEXT = 2048  # `max_length` of generation if the base does not state its context


@dataclass(frozen=True)
class SharedWeights:
    """How the ranks of a run load a base whose files only rank 0 reads.

    Attributes:
        is_reader: whether this is rank 0.
        broadcast: copies the weights of rank 0 into the models of all ranks; False if the models differ.
    """

    is_reader: bool
    broadcast: Callable[[nn.Module], bool]


def fetch_base(section: ModelSection) -> Path:
    """The local folder of the base, downloaded if needed.

    Raises:
        ModelError, RecipeError, RunEnvironmentError: as `hub.base_folder` and `hub.check_pinned`.
    """
    check_pinned(section)
    return base_folder(section.base, section.revision, weights=not section.random_init)


def load_model(
    section: ModelSection, chat: ChatTokenizer, seed: int, shared: SharedWeights | None = None
) -> PreTrainedModel:
    """Loads the base in float32, with an embedding row for every token of the chat tokenizer.

    The generation config gets the end tokens, and `forward_path(model)` says how the model trains. Weights are random
    only with `random_init`.

    Args:
        section: the recipe's `model`.
        chat: the tokenizer.
        seed: of random weights.
        shared: several ranks load the base together; None reads the files in this process.

    Raises:
        ModelError: if weights are missing or damaged, or the model and the tokenizer do not fit.
        RecipeError: if the attention kernel cannot run on this machine or with this model.
    """
    where, folder = f"model.base {section.base}", fetch_base(section)
    check_model_folder(folder, section)
    config = _config(folder, section, where)
    transformers_logging.disable_progress_bar()
    kernel = choose_attention(section.attention, section.dtype, AttentionShape.of(config)).kernel
    build = partial(_build, folder, section, where, config, seed=seed, shared=shared)
    try:
        model = build("eager" if kernel == "eager" else "sdpa")
    except _UnsupportedKernel:
        if section.attention != "auto":
            raise RecipeError(
                "model.attention", f"{section.base} does not support {kernel} attention",
                "set attention: auto or eager",
            ) from None  # fmt: skip
        model = build("eager")
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

    `model.overrides` are part of the configuration.

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
    if section.overrides:
        digest.update(json.dumps(section.overrides, sort_keys=True).encode())
    return digest.hexdigest()[:16]


class _UnsupportedKernel(Exception):
    """The model's code does not support an attention kernel."""


def _config(folder: Path, section: ModelSection, where: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # transformers raises many types for an invalid configuration
        raise ModelError(where, f"its config.json cannot be used ({first_line(error)})", "download it again") from None
    return _overridden(config, section) if section.overrides else config


def _overridden(config: Any, section: ModelSection) -> Any:
    """The configuration with `model.overrides`, which can also name keys of its rotary embedding.

    Raises:
        RecipeError: if there is no such key, its value has another type, or weights would have another shape.
    """
    new = copy.deepcopy(config)
    rope = getattr(new, "rope_parameters", None)
    for key, value in section.overrides.items():
        in_rope = isinstance(rope, dict) and key in rope
        known = rope if isinstance(rope, dict) and in_rope else new.to_dict()
        where = f"model.overrides.{key}"
        if key not in known:
            names = [*new.to_dict(), *(rope if isinstance(rope, dict) else ())]
            guess = closest(key, names)
            remedy = f"did you mean `{guess}`?" if guess else "remove it, or correct its name"
            raise RecipeError(where, f"the config of {section.base} has no such key", remedy)
        fitting = _of_same_type(value, known[key], where)
        if isinstance(rope, dict) and in_rope:
            rope[key] = fitting
        else:
            setattr(new, key, fitting)
    if (changed := _changed_shapes(config, new, section.trust_remote_code)) is not None:
        keys = ", ".join(section.overrides)
        raise RecipeError(
            "model.overrides", f"{keys}: {changed} would have another shape than in {section.base}", "remove it"
        )
    return new


def _of_same_type(value: Any, old: Any, where: str) -> Any:
    """The value as the type of the old one. Raises RecipeError if it has another type."""
    if isinstance(old, Mapping) and isinstance(value, Mapping):
        return {**old, **value}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(old, float) and is_number:
        return float(value)
    if isinstance(old, int) and not isinstance(old, bool) and is_number and value == int(value):
        return int(value)
    if old is not None and type(value) is not type(old):
        what = f"{json.dumps(value)} is not of the type of the base's own value, {json.dumps(old)}"
        raise RecipeError(where, what, "correct it")
    return value


def _changed_shapes(old: Any, new: Any, trust_remote_code: bool) -> str | None:
    """The first weight that has another shape with the new configuration; None if all are the same."""
    shapes = []
    for config in (old, new):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        except Exception as error:  # the architecture's code raises any type for values that do not fit
            if config is old:
                return None
            what = f"the model rejects them ({first_line(error)})"
            raise RecipeError("model.overrides", what, "correct them") from None
        shapes.append({name: weight.shape for name, weight in model.named_parameters()})
    names = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    return names[0] if names else None


def _build(
    folder: Path, section: ModelSection, where: str, config: Any, kernel: str, seed: int,
    shared: SharedWeights | None,
) -> PreTrainedModel:  # fmt: skip
    """The model with one attention kernel, with its own or with random weights."""
    options = {"attn_implementation": kernel, "dtype": torch.float32}
    if not section.random_init:
        own = {**options, **({"config": config} if section.overrides else {})}
        if shared is None:
            return _pretrained(folder, section, where, own)
        if shared.is_reader:
            model = _pretrained(folder, section, where, own)
            shared.broadcast(model)
            return model
        empty = _without_weights(folder, section, copy.deepcopy(config), options)
        if shared.broadcast(empty) and isinstance(empty, PreTrainedModel):
            return empty
        return _pretrained(folder, section, where, own)  # e.g. a quantized base
    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **options)
    except Exception as error:  # the architecture's code raises any type for sizes that do not fit
        if "does not support" in str(error):
            raise _UnsupportedKernel from None
        raise ModelError(where, f"cannot be created ({first_line(error)})", "use another base") from None


def _without_weights(folder: Path, section: ModelSection, config: Any, options: dict[str, Any]) -> nn.Module:
    """The model that `_pretrained` returns, with uninitialised weights and buffers; no weight file is read.

    If the architecture's code cannot build it so, an empty module, which differs from the model of every rank.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **options)
    except Exception as error:  # code that computes with its weights, which the meta device has not
        if "does not support" in str(error) and "attention" in str(error).lower():
            raise _UnsupportedKernel from None
        return nn.Module()
    model.to_empty(device="cpu")
    if any(isinstance(value, Tensor) and value.is_meta for m in model.modules() for value in vars(m).values()):
        return nn.Module()  # tensors that are neither parameters nor buffers
    model.tie_weights()  # `to_empty` gives each name a tensor of its own
    with suppress(OSError):  # the base has none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


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


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compiles every decoder layer of a model in place, with static shapes.

    All layers of a kind share their compiled code, for any documents in rows of one length. Compiled code depends only
    on the software and the machine, so a resumed run rounds as the first one. `backend` is that of `torch.compile`.

    Raises:
        RunEnvironmentError: if `torch.compile` does not work on this machine.
    """
    if (problem := compile_problem()) is not None:
        raise RunEnvironmentError("train.torch_compile", problem, "mend it, or set torch_compile: false")
    torch._dynamo.config.optimize_ddp = False  # DDP would split the graph of a layer at its buckets of gradients
    layer_classes = set(model._no_split_modules or [])
    for module in model.modules():
        if type(module).__name__ in layer_classes:
            module.compile(dynamic=False, backend=backend)


def compile_problem() -> str | None:
    """Why `torch.compile` does not work on this machine, in words; None if it does.

    On a GPU, a small function is compiled and run: Triton also needs a C compiler and the headers of Python.
    """
    if torch.cuda.is_available():
        return _triton_problem()
    compilers = ("g++", "clang++", "c++")
    return None if any(map(shutil.which, compilers)) else f"no C++ compiler is installed ({', '.join(compilers)})"


@cache
def _triton_problem() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        torch.compile(lambda x: x.exp().sum())(torch.zeros(8, device="cuda")).item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of a compiler, or of the file system
        return f"torch.compile fails on this GPU ({first_line(error)})"
    return None


@contextmanager
def not_compiled() -> Iterator[None]:
    """Runs compiled layers eagerly, for example in evaluation, whose rows have other lengths."""
    with torch.compiler.set_stance("force_eager"):
        yield
