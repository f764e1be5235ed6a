"""A small copy of a model: its own first layers, a part of its vocabulary, and weights that hide nothing.

A question to the copy costs little even where the model has 8 billion weights. The layers are the model's own modules,
so that nothing about an architecture has to be known: as many from the first as it takes to have every kind of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from nesso_tune.errors import ModelError, first_line
from nesso_tune.model.attention import DOCUMENT_ATTENTION, AttentionSpans, Kernel, enable_document_attention
from nesso_tune.model.lm_head import ForwardPath, GenerationMode, PackedRow, attach_supervised_head, plain_logits

VOCABULARY = 128  # rows that are copied of tables with many
MANY_ROWS = 4096
SPREAD = 2.5  # standard deviation that the logits are brought to: a cap cannot be seen on small ones
WINDOW = 4  # tokens that a layer with a sliding window sees in the copy, fewer than the copy is asked for


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model in evaluation mode, in float32 on its device; the model and random states stay as they are.

    Raises:
        Exception: of many kinds, where a model cannot be copied.
    """
    memo: dict[int, Any] = {}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary > MANY_ROWS:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() and tensor.shape[0] == vocabulary:
                rows = tensor.detach()[:VOCABULARY].clone()
                memo[id(tensor)] = nn.Parameter(rows) if isinstance(tensor, nn.Parameter) else rows
    for layers in _layer_lists(model):
        memo[id(layers)] = nn.ModuleList(copy.deepcopy(layer, memo) for layer in _one_of_each(layers))
    small: PreTrainedModel = copy.deepcopy(model, memo).eval()
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    _narrow_windows(small)
    _stir(small)
    return small


def spread_logits(model: PreTrainedModel, logits_of: Any) -> None:
    """Scales a copy's output embeddings until the logits that `logits_of()` gives spread enough."""
    head = model.get_output_embeddings()
    for _ in range(4):
        with torch.no_grad():
            spread = float(logits_of().float().std())
            if not 0 < spread < SPREAD * 0.8 or head is None:
                return
            head.weight *= SPREAD / spread


def _layer_lists(model: PreTrainedModel) -> list[nn.ModuleList]:
    """The lists of as many modules as the model has layers, none inside another such list."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found: list[nn.ModuleList] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def _one_of_each(layers: nn.ModuleList) -> Iterable[nn.Module]:
    """The first layers, at least two, up to where every kind has been."""
    seen: set[str] = set()
    last = 1
    for i, layer in enumerate(layers):
        if (kind := _kind(layer)) not in seen:
            seen.add(kind)
            last = max(last, i)
    return list(layers)[: last + 1]


def _kind(layer: nn.Module) -> str:
    """What a layer is made of, and its switches; numbers only by whether they are given, since one counts layers."""
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


def _narrow_windows(model: PreTrainedModel) -> None:
    """Sliding windows of a few tokens, so that a path that knows nothing of them differs on short rows."""
    for holder in [model.config, model.config.get_text_config(decoder=True), *model.modules()]:
        for name in ("sliding_window", "attention_chunk_size"):
            value = vars(holder).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                setattr(holder, name, WINDOW)


@torch.no_grad()
def _stir(model: PreTrainedModel) -> None:
    """Weights of which none is idle: no bias of 0, no matrix so small that what a layer adds is lost beside its input.

    Matrices of an ordinary size, as those of a trained model, stay as they are.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

    for tensor in _weights(model):
        if tensor.dim() < 2:
            tensor += 0.1 * noise(tensor)
            continue
        usual, spread = 1 / math.sqrt(max(tensor.shape[1:])), float(tensor.std())
        if spread < 1e-6:
            tensor += usual * noise(tensor)
        elif spread < usual / 2:
            tensor *= usual / spread


def _weights(model: PreTrainedModel) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.is_floating_point() and p.numel() > 0)


LENGTHS = (7, 5, 6)  # tokens of the documents that are scored
ANSWER = 3  # tokens that are generated after each
IGNORED = -100
FUSED_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what TRL's trainers ask their head for
NEAR = 2e-4  # how far log-probabilities may be off, in nats, and gradients, as a share of their norm: rounding only
MARGIN = 8  # rows that a table of learned positions may have beyond the positions

Batch = dict[str, Any]
_CHOSEN: dict[tuple[Any, ...], ForwardPath] = {}  # one answer for all models of a configuration in this process


def choose_forward_path(model: PreTrainedModel, kernel: Kernel, where: str) -> ForwardPath:
    """Finds the path for a model, and sets its attention accordingly.

    Args:
        model: as loaded: on one device, in float32, neither wrapped nor sharded.
        kernel: what computes attention by document; `eager` never does.
        where: what errors call the model.

    Raises:
        ModelError: if a token's score depends on tokens after it, or the model scores no tokens at all.
    """
    kernel = kernel if model._can_set_attn_implementation() else "eager"
    key = (type(model), model.config.to_json_string(), model.config._attn_implementation, kernel, model.device)
    path = _CHOSEN.get(key) or _asked(model, kernel, where)
    _CHOSEN[key] = path
    if path.padding_free:
        model.set_attn_implementation(DOCUMENT_ATTENTION[kernel])
    model.nesso_forward_path = path  # type: ignore[assignment]
    return path


def _asked(model: PreTrainedModel, kernel: Kernel, where: str) -> ForwardPath:
    try:
        small = small_copy(model)
    except Exception:  # whatever an architecture's own code does on being copied
        return ForwardPath("own", packs_by_position_ids=False, padding="alone")
    with torch.random.fork_rng(devices=[]):
        question = _Question(small, where)
        path = question.answer(kernel)
        return replace(path, generation=question.generation())


def choose_generation_mode(model: PreTrainedModel) -> GenerationMode:
    """How a loaded model, of any precision, writes what its own forward finds likeliest: `ForwardPath.generation`."""
    try:
        with torch.random.fork_rng(devices=[]):
            return _Question(small_copy(model).float(), "").generation()
    except Exception:  # whatever an architecture's own code does on being copied
        return "batch"


@dataclass
class _Scores:
    """Log-probabilities of the tokens of all documents, after the first of each, and the gradient of their sum."""

    log_probs: Tensor
    gradients: dict[str, Tensor]

    def alike(self, other: _Scores) -> bool:
        if self.log_probs.shape != other.log_probs.shape:
            return False
        scale = max(1.0, float(self.log_probs.abs().max()))
        if not (self.log_probs - other.log_probs).abs().max() <= NEAR * scale:
            return False
        if self.gradients.keys() != other.gradients.keys():
            return False
        norms = {name: float(gradient.norm()) for name, gradient in self.gradients.items()}
        floor = 1e-2 * NEAR * max(norms.values(), default=0.0)
        return all(
            float((other.gradients[name] - gradient).norm()) <= 5 * NEAR * norms[name] + floor
            for name, gradient in self.gradients.items()
        )

    @property
    def loss(self) -> float:
        return -float(self.log_probs.mean())


class _Question:
    """What a small copy is asked."""

    def __init__(self, model: PreTrainedModel, where: str) -> None:
        self.model, self.where = model, where
        self.device = next(model.parameters()).device
        rows = min(model.get_input_embeddings().weight.shape[0], 97)
        generator = torch.Generator().manual_seed(1)
        self.documents = [torch.randint(3, rows, (n,), generator=generator).to(self.device) for n in LENGTHS]
        pad = model.config.get_text_config(decoder=True).pad_token_id
        self.pad = pad if isinstance(pad, int) and 0 <= pad < rows else 0

    def answer(self, kernel: Kernel) -> ForwardPath:
        alone = self._alone()
        path = ForwardPath(max_positions=self._positions())
        if self._right(path, self._one_by_one(), alone) and self._by_document(kernel, path, alone):
            return replace(path, padding_free=True)
        self._assert_causal()
        path = self._with_head(path, alone)
        path = self._with_padding(path, alone)
        packed = self._scores(path, [self._packed()])
        if packed is None or not packed.alike(alone):
            figures = (packed.loss, alone.loss) if packed is not None else None
            path = replace(path, packs_by_position_ids=False, packing_losses=figures)
        return path

    @torch.no_grad()
    def generation(self) -> GenerationMode:
        """The first way to generate that writes what the model's own forward finds likeliest, token by token."""
        wanted = []
        for ids in self.documents:
            written = ids
            for _ in range(ANSWER):
                written = torch.cat([written, self._own(written)[0, -1:].argmax(dim=-1)])
            wanted.append(written[len(ids) :].tolist())
        prompts = [ids.tolist() for ids in self.documents]
        self.model.generation_config = GenerationConfig()  # no token ends an answer here
        for way in get_args(GenerationMode)[:-1]:
            try:
                if generate_greedily(self.model, prompts, way, ANSWER, pad=self.pad, end=None) == wanted:
                    return way  # type: ignore[no-any-return]
            except Exception:  # of an architecture whose cache or padding does not work
                continue
        return "uncached"

    def _alone(self) -> _Scores:
        """Each document by itself through the model's own forward, as plain transformers computes it."""
        try:
            spread_logits(self.model, lambda: torch.cat([self._own(ids)[0] for ids in self.documents]))
            found = [_chosen(self._own(ids)[0], ids) for ids in self.documents]
            return self._with_gradients(torch.cat(found))
        except Exception as error:  # of an architecture that wants more than tokens
            raise ModelError(
                self.where, f"{type(self.model).__name__} does not score a row of tokens ({first_line(error)})",
                "use a causal language model",
            ) from None  # fmt: skip

    def _own(self, ids: Tensor) -> Tensor:
        return plain_logits(self.model, {"input_ids": ids[None]})

    def _with_gradients(self, log_probs: Tensor) -> _Scores:
        named = dict(self.model.named_parameters())
        found = torch.autograd.grad(log_probs.sum(), list(named.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(named, found, strict=True) if g is not None and g.any()}
        return _Scores(log_probs.detach(), gradients)

    def _assert_causal(self) -> None:
        """Raises ModelError where what follows a token changes its score: such a model reads what it should predict."""
        first, second, _ = self.documents
        with torch.no_grad():
            alone = _chosen(self._own(first)[0], first)
            followed = _chosen(self._own(torch.cat([first, second]))[0], torch.cat([first, second]))[: len(alone)]
        if (alone - followed).abs().max() <= NEAR * max(1.0, float(alone.abs().max())):
            return
        figures = f"loss of {len(alone)} tokens {-float(followed.mean()):.5f} with text after them, "
        figures += f"{-float(alone.mean()):.5f} without"
        switch = getattr(self.model.config.get_text_config(decoder=True), "is_decoder", None)
        remedy = 'set "is_decoder": true in its config.json' if switch is False else "use a causal language model"
        raise ModelError(self.where, f"it sees the tokens that it should predict ({figures})", remedy)

    def _by_document(self, kernel: Kernel, path: ForwardPath, alone: _Scores) -> bool:
        """Whether rows without padding are right; the copy keeps that attention if they are."""
        if kernel == "eager":
            return False
        before = self.model.config._attn_implementation
        if enable_document_attention(self.model, kernel) and self._right(path, [self._row()], alone):
            return True
        self.model.set_attn_implementation(before)
        return False

    def _with_head(self, path: ForwardPath, alone: _Scores) -> ForwardPath:
        """The first head that is right; the model's own forward is, by definition."""
        tried = self._scores(path, self._one_by_one())
        if tried is not None and tried.alike(alone):
            return path
        figures = (tried.loss, alone.loss) if tried is not None else None
        trl = replace(path, head="trl", head_losses=figures)
        return trl if self._right(trl, self._one_by_one(), alone) else replace(trl, head="own")

    def _with_padding(self, path: ForwardPath, alone: _Scores) -> ForwardPath:
        """How rows are padded: as transformers' users do it, or in a way that this model takes."""
        tried = [path, replace(path, padding="none"), replace(path, padding="alone")]
        for one in tried:
            if (one.head != "trl" or one.padding == "mask") and self._right(one, [self._padded()], alone):
                return one
        return replace(path, head="own", padding="alone")

    def _right(self, path: ForwardPath, batches: list[Batch], alone: _Scores) -> bool:
        found = self._scores(path, batches)
        return found is not None and found.alike(alone)

    def _scores(self, path: ForwardPath, batches: list[Batch]) -> _Scores | None:
        """What a path makes of batches; None where it cannot take them."""
        if path.head == "trl":
            add_fused_lm_head(self.model, outputs=FUSED_HEAD_OUTPUTS)
        else:
            attach_supervised_head(self.model, path)
        try:
            outputs = [self.model(**batch, fused_lm_head=True) for batch in batches]
            return self._with_gradients(torch.cat([out.log_probs[out.label_mask] for out in outputs]))
        except Exception:  # it does not know an argument, or a shape
            return None
        finally:
            nn.Module.__delattr__(self.model, "forward")

    def _one_by_one(self) -> list[Batch]:
        return [{"input_ids": ids[None], "labels": ids[None]} for ids in self.documents]

    def _padded(self) -> Batch:
        """A document a row, padded to the right."""
        length = max(map(len, self.documents))
        shape = (len(self.documents), length)
        ids = torch.full(shape, self.pad, device=self.device)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, own in enumerate(self.documents):
            ids[row, : len(own)], labels[row, : len(own)], mask[row, : len(own)] = own, own, 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def _packed(self) -> Batch:
        """Two documents in the first row, one in the second, its padding a document more; no mask."""
        first, second, third = self.documents
        width = len(first) + len(second)
        padding = torch.full((width - len(third),), self.pad, device=self.device)
        rows = [(first, second), (third, padding)]
        ids = torch.stack([torch.cat(row) for row in rows])
        positions = torch.stack([torch.cat([torch.arange(len(part)) for part in row]) for row in rows]).to(self.device)
        labels = ids.masked_fill(positions == 0, IGNORED)
        labels[1, len(third) :] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _row(self) -> Batch:
        """All documents as one row, for attention by document."""
        ids = torch.cat(self.documents)[None]
        segments = AttentionSpans.from_documents(LENGTHS).to(self.device)
        labels = ids.masked_fill(segments.position_ids == 0, IGNORED)
        before = (labels[0, 1:] != IGNORED).nonzero().flatten()
        return {"labels": labels, "packed_row": PackedRow(ids, segments, before)}

    def _positions(self) -> int | None:
        """How many tokens the model has learned positions for, where a longer row fails."""
        stated = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        tables = [m.weight for m in self.model.modules() if isinstance(m, nn.Embedding)]
        tables = [t for t in tables if t is not self.model.get_input_embeddings().weight]
        tables += [buffer for buffer in self.model.buffers() if buffer.dim() > 1]
        if not isinstance(stated, int) or not any(stated <= len(t) <= stated + MARGIN for t in tables):
            return None
        if self._takes(stated + 2 * MARGIN):
            return None
        return next((n for n in range(stated + MARGIN, max(stated - 2 * MARGIN, 0), -1) if self._takes(n)), None)

    @torch.no_grad()
    def _takes(self, length: int) -> bool:
        try:
            self._own(self.documents[0][:1].expand(length))
        except (IndexError, RuntimeError, ValueError):
            return False
        return True


def generate_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    way: GenerationMode,
    most: int,
    *,
    pad: int,
    end: int | None,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, at most `most`; what follows the `end` token means nothing."""
    if way != "batch" and len(prompts) > 1:
        return [generate_greedily(model, [one], way, most, pad=pad, end=end)[0] for one in prompts]
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(own)) + list(own) for own in prompts]
    mask = [[0] * (longest - len(own)) + [1] * len(own) for own in prompts]
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        **({"use_cache": False} if way == "uncached" else {}),
    )
    return [row[longest:].tolist() for row in out]


def _chosen(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token after the first, [length - 1], from logits [length, vocabulary]."""
    return torch.log_softmax(logits[:-1].float(), dim=-1).gather(-1, ids[1:, None]).squeeze(-1)
