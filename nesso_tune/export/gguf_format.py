"""GGUF: one file for llama.cpp and programs built on it, such as Ollama; written here and checked in llama.cpp.

Only architectures, rotary embeddings and tokenizers are accepted whose counterpart in llama.cpp computes the same.
Needs the package `gguf`, and to check a file `xllamacpp` (extra `gguf`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import pi
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from nesso_tune.errors import ModelError, first_line, shortened
from nesso_tune.export.exporter import Format
from nesso_tune.export.gguf_vocabulary import Vocabulary
from nesso_tune.export.parity import END, Prompt, round_linear_layers
from nesso_tune.export.weights import FinishedRun
from nesso_tune.logs import logger

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
SHORT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # in names of files
TIMEOUT_S = 600
CONTEXT = 4096  # tokens; more than the longest prompt and answer of the check
GEMMA_PERIOD = 6  # every sixth layer has full attention: fixed in llama.cpp
ROPE_TYPES = ("default", "linear", "yarn")  # of every architecture; llama.cpp reads llama3's factors for LLAMA alone
TYPED_SYSTEM = "[SYSTEM_PROMPT]"  # llama.cpp gives templates with it a list of parts as the system message


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes an architecture.

    Attributes:
        arch: its name in GGUF.
        activation: the activation of its feed-forward layers.
        interleaved: rotary embedding of neighbouring dimensions; transformers rotates the two halves of a head.
        unit_offset: RMSNorm multiplies by 1 + weight in transformers, by the weight in llama.cpp.
        has_biases: llama.cpp reads biases of its attention.
    """

    arch: gguf.MODEL_ARCH
    activation: str = "silu"
    interleaved: bool = False
    unit_offset: bool = False
    has_biases: bool = True


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, has_biases=False),
    "gemma3_text": Architecture(
        gguf.MODEL_ARCH.GEMMA3, activation="gelu_pytorch_tanh", unit_offset=True, has_biases=False
    ),
}


def check_architecture(config: Any) -> Architecture:
    """The counterpart of a configuration in llama.cpp.

    Raises:
        ModelError: if there is none that computes the same.
    """
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ModelError("--to gguf", f"unknown architecture {config.model_type}", f"supported are {supported}")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    reasons = [
        ("activation", str(activation), activation != known.activation),
        ("attention", "sliding windows", "qwen" in config.model_type and "sliding_attention" in layer_types),
        ("final_logit_softcapping", "set", getattr(config, "final_logit_softcapping", None) is not None),
        ("attn_logit_softcapping", "set", getattr(config, "attn_logit_softcapping", None) is not None),
        ("layer_types", f"not full attention every {GEMMA_PERIOD} layers",
         known.unit_offset and _layer_types(config) != list(config.layer_types)),
        ("query_pre_attn_scalar", "not the size of a head",
         known.unit_offset and config.query_pre_attn_scalar != head_size(config)),
        ("attention_bias", "set", not known.has_biases and bool(getattr(config, "attention_bias", False))),
        ("use_bidirectional_attention", "set", bool(getattr(config, "use_bidirectional_attention", False))),
    ]  # fmt: skip
    for key, value, unsupported in reasons:
        if unsupported:
            what = f"llama.cpp does not compute {config.model_type} with this {key} ({value})"
            raise ModelError("--to gguf", what, "export --to hf")
    return known


def _layer_types(config: Any) -> list[str]:
    kinds = ["sliding_attention"] * (GEMMA_PERIOD - 1) + ["full_attention"]
    return [kinds[i % GEMMA_PERIOD] for i in range(config.num_hidden_layers)]


def write_gguf(model: PreTrainedModel, folder: Path, file: Path, dtype: str, name: str) -> None:
    """Writes a model and its tokenizer.

    Args:
        model: its weights; at least as precise as `dtype`.
        folder: folder with its tokenizer and chat template.
        file: the file to write.
        dtype: float32, float16, bfloat16 or q8_0. Vectors are always float32; matrices whose rows are no multiple of
            32 are float16 in q8_0.
        name: name of the model.

    Raises:
        ModelError: if llama.cpp has no counterpart of the architecture or the tokenizer.
    """
    known = check_architecture(model.config)
    vocabulary = Vocabulary.read(folder, rows=model.get_input_embeddings().weight.shape[0])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[known.arch])
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config, known)
    _add_rope(writer, model.config)
    vocabulary.write(writer)
    try:
        _add_tensors(writer, model, known, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def head_size(config: Any) -> int:
    """Size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_shape(writer: gguf.GGUFWriter, config: Any, known: Architecture) -> None:
    size, context = head_size(config), context_length(config)
    if known.unit_offset:
        writer.add_sliding_window(config.sliding_window)
    elif context < config.max_position_embeddings:
        logger.warning(f"gguf: llama.cpp computes mistral without its sliding window: context limited to {context:,}")
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def context_length(config: Any) -> int:
    """Tokens over which llama.cpp computes the same: it ignores the sliding window of mistral."""
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    return min(context, window) if config.model_type == "mistral" and window is not None else context


def rotary_parameters(config: Any) -> dict[str, Any]:
    """The rotary embedding of a configuration: of layers with full attention, where there are others.

    Raises:
        ModelError: for a kind that llama.cpp lacks.
    """
    rope = dict(config.rope_parameters)
    if "full_attention" in rope:
        sliding, rope = rope["sliding_attention"], dict(rope["full_attention"])
        if sliding.get("rope_type", "default") != "default":
            raise _unsupported_rope(f"{sliding['rope_type']} scaling in layers with sliding attention")
        rope["sliding_theta"] = sliding["rope_theta"]
    kind = rope.get("rope_type", "default")
    supported = (*ROPE_TYPES, *(["llama3"] if ARCHITECTURES[config.model_type].arch is gguf.MODEL_ARCH.LLAMA else []))
    if kind not in supported:
        remedy = f"export --to hf; supported are the types {', '.join(supported)}"
        raise ModelError("--to gguf", f"llama.cpp does not compute {config.model_type} with rope_type {kind}", remedy)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported_rope("a partial rotation")
    given = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"} & rope.keys()
    if not rope.get("truncate", True):
        given.add("truncate: false")
    if kind == "yarn" and given:
        raise _unsupported_rope(f"yarn with {', '.join(sorted(given))}")
    return rope


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = rotary_parameters(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_theta" in rope:
        writer.add_rope_freq_base_swa(float(rope["sliding_theta"]))
    if kind == "llama3":
        writer.add_tensor(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", _llama3_factors(rope, config))
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)


def _unsupported_rope(what: str) -> ModelError:
    what = f"the rotary embedding has {what}, which llama.cpp lacks or computes differently"
    return ModelError("--to gguf", what, "export --to hf")


def _llama3_factors(rope: Mapping[str, Any], config: Any) -> np.ndarray:
    """Divisors of the rotary frequencies, [head size / 2], as `rope_type: llama3` of transformers computes them."""
    size = head_size(config)
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * pi)  # over the original context
    smooth = (turns - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    whole = torch.full_like(turns, rope["factor"])
    factors = torch.where(turns > high, torch.ones_like(turns), torch.where(turns < low, whole, between))
    return factors.numpy()


def _add_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, known: Architecture, dtype: str) -> None:
    names = gguf.get_tensor_name_map(known.arch, model.config.num_hidden_layers)
    for own, parameter in model.named_parameters():  # a tied head occurs once, as the embedding: llama.cpp expects this
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError("--to gguf", f"llama.cpp has no tensor for {own}", "export --to hf")
        weight = parameter.detach().float()
        if known.interleaved and ("q_proj" in own or "k_proj" in own):
            heads = model.config.num_attention_heads if "q_proj" in own else model.config.num_key_value_heads
            weight = _interleave(weight, heads)
        if known.unit_offset and own.endswith("norm.weight"):
            weight = weight + 1
        kind = TYPES[dtype] if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
        if kind is TYPES["q8_0"] and weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = TYPES["float16"]
        if kind is TYPES["float16"] and not torch.isfinite(weight.half()).all():
            raise ModelError("--to gguf", f"{own} does not fit into float16", "use --dtype bf16 or q8_0")
        writer.add_tensor(name, gguf.quants.quantize(weight.contiguous().numpy(), kind), raw_dtype=kind)


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head: those of its two halves, in turn."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_file(folder: Path) -> Path:
    """The GGUF file of an export."""
    return next(folder.glob("*.gguf"))


def quantisation_command(file: Path) -> str:
    """The command of llama.cpp that quantises the file further."""
    stem = file.stem.rsplit("-", 1)[0]
    return f"llama-quantize {shlex.quote(str(file))} {shlex.quote(str(file.with_name(f'{stem}-Q4_K_M.gguf')))} Q4_K_M"


def _check(run: FinishedRun) -> None:
    config = AutoConfig.from_pretrained(run.final)
    check_architecture(config)
    rotary_parameters(config)
    if TYPED_SYSTEM in (run.final / "chat_template.jinja").read_text(encoding="utf-8"):
        what = f"llama.cpp passes the system message of templates with {TYPED_SYSTEM} in parts, not as text"
        raise ModelError("--to gguf", what, "export --to hf, or train with another chat.template")
    Vocabulary.read(run.final, config.vocab_size)


def _write(run: FinishedRun, model: PreTrainedModel, folder: Path, dtype: str) -> None:
    name = run.path.resolve().name
    write_gguf(model, run.final, folder / f"{name}-{SHORT_NAMES[dtype]}.gguf", dtype, name)


class LlamaCppRuntime:
    """A GGUF file in llama.cpp's server, on the CPU.

    Keys, values and attention are computed in float32, so that only the file's rounding is measured.
    """

    def __init__(self, file: Path, threads: int) -> None:
        import xllamacpp

        self.name = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = CONTEXT
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.use_jinja = True
        parameters.warmup = False
        parameters.verbosity = -1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            what = f"{self.name} cannot load the file ({first_line(error)})"
            raise ModelError("--to gguf", what, "export --to hf, and report the model's architecture") from None

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """See `Runtime`."""
        request: dict[str, Any] = {"messages": prompt.messages, "add_generation_prompt": True}
        if prompt.tools:
            request["tools"] = prompt.tools
        text = self._post("apply-template", request)["prompt"]
        return list(self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def likeliest(self, prompt_ids: Sequence[int], answer: Sequence[int]) -> list[int]:
        """See `Runtime`. Continues greedily, and after a token that is not the answer's again from the answer."""
        found: list[int] = []
        while len(found) < len(answer):
            rest = self._continuation([*prompt_ids, *answer[: len(found)]], len(answer) - len(found))
            wrong = next((i for i, (a, b) in enumerate(zip(rest, answer[len(found) :], strict=False)) if a != b), None)
            found += rest if wrong is None else rest[: wrong + 1]
        return found

    def _continuation(self, ids: list[int], count: int) -> list[int]:
        """Between 1 and `count` greedy tokens."""
        request = {"prompt": ids, "n_predict": count, "temperature": 0.0, "top_k": 1, "return_tokens": True,
                   "cache_prompt": False, "stream": False}  # fmt: skip
        answer = self._post("completion", request)
        tokens = [int(token) for token in answer["tokens"]][:count]
        return [*tokens, END] if len(tokens) < count else tokens

    def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        body = Request(f"{self._server.listening_address}/{path}", json.dumps(request).encode(),
                       {"Content-Type": "application/json"})  # fmt: skip
        try:
            with urlopen(body, timeout=TIMEOUT_S) as response:
                answer: dict[str, Any] = json.load(response)
        except HTTPError as error:
            what = f"{self.name} refuses a request ({shortened(error.read().decode(errors='replace'))})"
            raise ModelError("--to gguf", what, "export --to hf, and report the model's architecture") from None
        return answer


GGUF = Format(
    name="gguf",
    dtypes=tuple(TYPES),
    check=_check,
    write=_write,
    round=round_linear_layers,
    runtime=lambda run, folder: LlamaCppRuntime(gguf_file(folder), torch.get_num_threads()),
    context=context_length,
)
