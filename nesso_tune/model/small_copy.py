"""A small copy of a model: its own first layers, a part of its vocabulary, and weights that hide nothing.

A question to the copy costs little even where the model has 8 billion weights. The layers are the model's own modules,
so that nothing about an architecture has to be known: as many from the first as it takes to have every kind of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
