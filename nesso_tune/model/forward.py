"""Chooses the forward path of a model: head, packing, padding and generation mode.

Fused heads, packing and padding give wrong losses for some architectures, without an error. Every model is therefore
probed before training, on a small copy with its first layers and a part of its vocabulary. The reference is the model's
own forward on three short documents, one at a time. The probe tries paths from the fastest to the slowest and takes the
first with the same log-probabilities and gradients as the reference. Greedy generation is chosen in the same way.

The layers of the copy are the model's own modules, so the probe needs no knowledge of the architecture, and it stays
cheap for models of any size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.errors import ModelError, first_line
from nesso_tune.model.attention import DOCUMENT_ATTENTION, AttentionSpans, Kernel, enable_document_attention
from nesso_tune.model.lm_head import (
    ForwardPath,
    GenerationMode,
    PackedRow,
    attach_supervised_head,
    plain_logits,
)

FUSED_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # as TRL's trainers request them

# the probe
DOCUMENT_LENGTHS = (7, 5, 6)
ANSWER_TOKENS = 3  # generated after each document
# Tolerance for rounding: of log-probabilities in nats, of gradients relative to their norm.
TOLERANCE = 2e-4
POSITION_MARGIN = 8  # rows that a table of learned positions may have beyond max_position_embeddings

# the small copy
COPIED_VOCABULARY = 128  # copied rows of tables with more than LARGE_VOCABULARY
LARGE_VOCABULARY = 4096
LOGIT_STD = 2.5  # logits are scaled to this standard deviation: soft-capping does not change small ones
MAX_WINDOW = 4  # sliding windows are reduced to this, below the length of the documents

Batch = dict[str, Any]
_PATHS: dict[tuple[Any, ...], ForwardPath] = {}  # cache: one probe per configuration and process


def choose_forward_path(model: PreTrainedModel, kernel: Kernel, where: str) -> ForwardPath:
    """Finds the forward path of a model, stores it in the model and enables document attention if the path uses it.

    Args:
        model: as loaded: on one device, in float32, neither wrapped nor sharded.
        kernel: the kernel of document attention; with `eager` there is none.
        where: the name of the model in errors.

    Raises:
        ModelError: if the model is not causal, or cannot score a row of tokens at all.
    """
    kernel = kernel if model._can_set_attn_implementation() else "eager"
    key = (type(model), model.config.to_json_string(), model.config._attn_implementation, kernel, model.device)
    path = _PATHS.get(key) or _probe(model, kernel, where)
    _PATHS[key] = path
    if path.padding_free:
        model.set_attn_implementation(DOCUMENT_ATTENTION[kernel])
    model.nesso_forward_path = path  # type: ignore[assignment]
    return path


def choose_generation_mode(model: PreTrainedModel) -> GenerationMode:
    """`ForwardPath.generation` of a loaded model of any precision."""
    try:
        with torch.random.fork_rng(devices=[]):
            return _Probe(small_copy(model).float(), "").generation_mode()
    except Exception:  # some architectures cannot be copied
        return "batch"


def _probe(model: PreTrainedModel, kernel: Kernel, where: str) -> ForwardPath:
    try:
        small = small_copy(model)
    except Exception:  # some architectures cannot be copied
        return ForwardPath("own", packs_by_position_ids=False, padding="alone")
    with torch.random.fork_rng(devices=[]):
        probe = _Probe(small, where)
        path = probe.forward_path(kernel)
        return replace(path, generation=probe.generation_mode())


def generate_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    mode: GenerationMode,
    max_new_tokens: int,
    *,
    pad: int,
    end: int | None,
) -> list[list[int]]:
    """Greedy continuation of each prompt, at most `max_new_tokens`; tokens after the `end` token are meaningless."""
    if mode != "batch" and len(prompts) > 1:
        return [generate_greedily(model, [one], mode, max_new_tokens, pad=pad, end=end)[0] for one in prompts]
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        max_length=None,  # `generation_config` has the context length, and transformers warns about two limits
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        **({"use_cache": False} if mode == "uncached" else {}),
    )
    return [row[longest:].tolist() for row in out]


@dataclass
class _Scores:
    """Log-probabilities of all documents' tokens after the first, and the gradients of their sum."""

    log_probs: Tensor
    gradients: dict[str, Tensor]

    def close_to(self, other: _Scores) -> bool:
        """Whether both are equal up to rounding."""
        if self.log_probs.shape != other.log_probs.shape:
            return False
        scale = max(1.0, float(self.log_probs.abs().max()))
        if not (self.log_probs - other.log_probs).abs().max() <= TOLERANCE * scale:
            return False
        if self.gradients.keys() != other.gradients.keys():
            return False
        norms = {name: float(gradient.norm()) for name, gradient in self.gradients.items()}
        floor = 1e-2 * TOLERANCE * max(norms.values(), default=0.0)
        return all(
            float((other.gradients[name] - gradient).norm()) <= 5 * TOLERANCE * norms[name] + floor
            for name, gradient in self.gradients.items()
        )

    @property
    def loss(self) -> float:
        """Mean negative log-probability."""
        return -float(self.log_probs.mean())


class _Probe:
    """Compares the forward paths of a small copy with the model's own forward on single documents."""

    def __init__(self, model: PreTrainedModel, where: str) -> None:
        self.model, self.where = model, where
        self.device = next(model.parameters()).device
        vocabulary = min(model.get_input_embeddings().weight.shape[0], 97)
        generator = torch.Generator().manual_seed(1)
        self.documents = [
            torch.randint(3, vocabulary, (n,), generator=generator).to(self.device) for n in DOCUMENT_LENGTHS
        ]
        pad = model.config.get_text_config(decoder=True).pad_token_id
        self.pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0

    def forward_path(self, kernel: Kernel) -> ForwardPath:
        """The fastest path that reproduces the model's own forward; its generation mode is not chosen yet."""
        reference = self._reference()
        path = ForwardPath(max_positions=self._max_positions())
        if self._matches(path, self._single_documents(), reference) and self._padding_free(kernel, path, reference):
            return replace(path, padding_free=True)
        self._check_causal()
        path = self._choose_head(path, reference)
        path = self._choose_padding(path, reference)
        packed = self._scores(path, [self._packed_batch()])
        if packed is None or not packed.close_to(reference):
            losses = (packed.loss, reference.loss) if packed is not None else None
            path = replace(path, packs_by_position_ids=False, packing_losses=losses)
        return path

    @torch.no_grad()
    def generation_mode(self) -> GenerationMode:
        """The fastest mode that generates the top-1 tokens of the model's own forward."""
        expected = []
        for ids in self.documents:
            sequence = ids
            for _ in range(ANSWER_TOKENS):
                sequence = torch.cat([sequence, self._logits(sequence)[0, -1:].argmax(dim=-1)])
            expected.append(sequence[len(ids) :].tolist())
        prompts = [ids.tolist() for ids in self.documents]
        self.model.generation_config = GenerationConfig()  # without an end token
        for mode in get_args(GenerationMode)[:-1]:
            try:
                if generate_greedily(self.model, prompts, mode, ANSWER_TOKENS, pad=self.pad, end=None) == expected:
                    return mode  # type: ignore[no-any-return]
            except Exception:  # the architecture's cache or padding does not work
                continue
        return "uncached"

    def _reference(self) -> _Scores:
        """Scores of each document alone by the model's own forward."""
        try:
            _scale_logits(self.model, lambda: torch.cat([self._logits(ids)[0] for ids in self.documents]))
            log_probs = [_token_log_probs(self._logits(ids)[0], ids) for ids in self.documents]
            return self._with_gradients(torch.cat(log_probs))
        except Exception as error:  # the architecture needs more inputs than tokens
            raise ModelError(
                self.where, f"{type(self.model).__name__} does not score a row of tokens ({first_line(error)})",
                "use a causal language model",
            ) from None  # fmt: skip

    def _check_causal(self) -> None:
        """Raises ModelError if later tokens change the score of a token: the model attends to its own targets."""
        first, second, _ = self.documents
        with torch.no_grad():
            alone = _token_log_probs(self._logits(first)[0], first)
            both = torch.cat([first, second])
            followed = _token_log_probs(self._logits(both)[0], both)[: len(alone)]
        if (alone - followed).abs().max() <= TOLERANCE * max(1.0, float(alone.abs().max())):
            return
        losses = f"loss of {len(alone)} tokens {-float(followed.mean()):.5f} with text after them, "
        losses += f"{-float(alone.mean()):.5f} without"
        is_decoder = getattr(self.model.config.get_text_config(decoder=True), "is_decoder", None)
        remedy = 'set "is_decoder": true in its config.json' if is_decoder is False else "use a causal language model"
        raise ModelError(self.where, f"the model is not causal: it attends to later tokens ({losses})", remedy)

    def _padding_free(self, kernel: Kernel, path: ForwardPath, reference: _Scores) -> bool:
        """Whether document attention matches the reference; if so, it stays enabled in the copy."""
        if kernel == "eager":
            return False
        before = self.model.config._attn_implementation
        if enable_document_attention(self.model, kernel) and self._matches(
            path, [self._padding_free_batch()], reference
        ):
            return True
        self.model.set_attn_implementation(before)
        return False

    def _choose_head(self, path: ForwardPath, reference: _Scores) -> ForwardPath:
        """The first head that matches; `own` matches by definition."""
        supervised = self._scores(path, self._single_documents())
        if supervised is not None and supervised.close_to(reference):
            return path
        losses = (supervised.loss, reference.loss) if supervised is not None else None
        trl = replace(path, head="trl", head_losses=losses)
        return trl if self._matches(trl, self._single_documents(), reference) else replace(trl, head="own")

    def _choose_padding(self, path: ForwardPath, reference: _Scores) -> ForwardPath:
        """The first padding that matches; the model's own forward on one row at a time matches by definition."""
        for candidate in (path, replace(path, padding="none"), replace(path, padding="alone")):
            applicable = candidate.head != "trl" or candidate.padding == "mask"
            if applicable and self._matches(candidate, [self._padded_batch()], reference):
                return candidate
        return replace(path, head="own", padding="alone")

    def _max_positions(self) -> int | None:
        """Number of learned position embeddings, if a longer row fails."""
        stated = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        tables = [t for t in tables if t is not self.model.get_input_embeddings().weight]
        tables += [buffer for buffer in self.model.buffers() if buffer.dim() > 1]
        if not isinstance(stated, int) or not any(stated <= len(t) <= stated + POSITION_MARGIN for t in tables):
            return None
        if self._accepts_length(stated + 2 * POSITION_MARGIN):
            return None
        lengths = range(stated + POSITION_MARGIN, max(stated - 2 * POSITION_MARGIN, 0), -1)
        return next((n for n in lengths if self._accepts_length(n)), None)

    @torch.no_grad()
    def _accepts_length(self, length: int) -> bool:
        try:
            self._logits(self.documents[0][:1].expand(length))
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    def _matches(self, path: ForwardPath, batches: list[Batch], reference: _Scores) -> bool:
        scores = self._scores(path, batches)
        return scores is not None and scores.close_to(reference)

    def _scores(self, path: ForwardPath, batches: list[Batch]) -> _Scores | None:
        """Scores of batches on a path; None if the model rejects them."""
        if path.head == "trl":
            add_fused_lm_head(self.model, outputs=FUSED_HEAD_OUTPUTS)
        else:
            attach_supervised_head(self.model, path)
        try:
            outputs = [self.model(**batch, fused_lm_head=True) for batch in batches]
            return self._with_gradients(torch.cat([out.log_probs[out.label_mask] for out in outputs]))
        except Exception:  # an argument or a shape is not supported
            return None
        finally:
            nn.Module.__delattr__(self.model, "forward")

    def _with_gradients(self, log_probs: Tensor) -> _Scores:
        parameters = dict(self.model.named_parameters())
        found = torch.autograd.grad(log_probs.sum(), list(parameters.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(parameters, found, strict=True) if g is not None and g.any()}
        return _Scores(log_probs.detach(), gradients)

    def _logits(self, ids: Tensor) -> Tensor:
        return plain_logits(self.model, {"input_ids": ids[None]})

    def _single_documents(self) -> list[Batch]:
        return [{"input_ids": ids[None], "labels": ids[None]} for ids in self.documents]

    def _padded_batch(self) -> Batch:
        """One document per row, padded to the right."""
        shape = (len(self.documents), max(map(len, self.documents)))
        ids = torch.full(shape, self.pad, device=self.device)
        labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
        for i, document in enumerate(self.documents):
            n = len(document)
            ids[i, :n], labels[i, :n], mask[i, :n] = document, document, 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def _packed_batch(self) -> Batch:
        """Two documents in the first row; one document and padding, as one more document, in the second; no mask."""
        first, second, third = self.documents
        padding = torch.full((len(first) + len(second) - len(third),), self.pad, device=self.device)
        rows = [(first, second), (third, padding)]
        ids = torch.stack([torch.cat(row) for row in rows])
        positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows]).to(self.device)
        labels = ids.masked_fill(positions == 0, IGNORE_INDEX)
        labels[1, len(third) :] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _padding_free_batch(self) -> Batch:
        """All documents in one row, for document attention."""
        ids = torch.cat(self.documents)[None]
        spans = AttentionSpans.from_documents(DOCUMENT_LENGTHS).to(self.device)
        labels = ids.masked_fill(spans.position_ids == 0, IGNORE_INDEX)
        logits_to_keep = (labels[0, 1:] != IGNORE_INDEX).nonzero().flatten()
        return {"labels": labels, "packed_row": PackedRow(ids, spans, logits_to_keep)}


def _token_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token after the first, [length - 1], from logits [length, vocabulary]."""
    return torch.log_softmax(logits[:-1].float(), dim=-1).gather(-1, ids[1:, None]).squeeze(-1)


def _scale_logits(model: PreTrainedModel, compute_logits: Callable[[], Tensor]) -> None:
    """Scales the output embeddings of a copy until the standard deviation of its logits is about `LOGIT_STD`."""
    head = model.get_output_embeddings()
    for _ in range(4):
        with torch.no_grad():
            std = float(compute_logits().float().std())
            if not 0 < std < LOGIT_STD * 0.8 or head is None:
                return
            head.weight *= LOGIT_STD / std


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode with at least one layer of every kind; the model and RNG states stay unchanged.

    Raises:
        Exception: of any type, if the architecture cannot be copied.
    """
    memo: dict[int, Any] = {}  # deepcopy takes these objects instead of copies
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary > LARGE_VOCABULARY:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() and tensor.shape[0] == vocabulary:
                rows = tensor.detach()[:COPIED_VOCABULARY].clone()
                memo[id(tensor)] = nn.Parameter(rows) if isinstance(tensor, nn.Parameter) else rows
    for layers in _layer_lists(model):
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in _representative_layers(layers))
    small: PreTrainedModel = copy.deepcopy(model, memo).eval()
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    _reduce_windows(small)
    _perturb_weights(small)
    return small


def _layer_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The outermost module lists with as many modules as the model has layers."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found: list[nn.ModuleList] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                found.append(child)
            else:
                search(child)

    search(model)
    return found


def _representative_layers(layers: nn.ModuleList) -> Iterable[nn.Module]:
    """The first layers, at least two, up to the first layer of the last new kind."""
    seen: set[str] = set()
    last = 1
    for i, layer in enumerate(layers):
        if (kind := _layer_kind(layer)) not in seen:
            seen.add(kind)
            last = max(last, i)
    return list(layers)[: last + 1]


def _layer_kind(layer: nn.Module) -> str:
    """Modules and settings of a layer; of integers only their presence, since one of them is the layer index."""
    settings = []
    for name, module in layer.named_modules():
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or key == "training":
                continue
            if isinstance(value, (bool, str)) or value is None:
                settings.append((name, key, value))
            elif isinstance(value, int):
                settings.append((name, key, "int"))
    return f"{layer}{settings}"


def _reduce_windows(model: PreTrainedModel) -> None:
    """Reduces sliding windows, so that a path that ignores them differs on short rows."""
    for holder in [model.config, model.config.get_text_config(decoder=True), *model.modules()]:
        for name in ("sliding_window", "attention_chunk_size"):
            value = vars(holder).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > MAX_WINDOW:
                setattr(holder, name, MAX_WINDOW)


@torch.no_grad()
def _perturb_weights(model: PreTrainedModel) -> None:
    """Makes every weight matter: adds noise to vectors and zero matrices, and scales up small matrices.

    Matrices of the usual size, as in a trained model, stay unchanged.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    for tensor in _floating_parameters(model):
        if tensor.dim() < 2:
            tensor += 0.1 * noise(tensor)
            continue
        usual_std, std = 1 / math.sqrt(max(tensor.shape[1:])), float(tensor.std())
        if std < 1e-6:
            tensor += usual_std * noise(tensor)
        elif std < usual_std / 2:
            tensor *= usual_std / std


def _floating_parameters(model: PreTrainedModel) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.is_floating_point() and p.numel() > 0)
