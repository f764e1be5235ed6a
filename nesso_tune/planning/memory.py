"""How much memory a training step needs on each GPU or on a CPU, from the shape of the model: an estimate to plan with.

What autograd keeps of a decoder layer is counted tensor by tensor for transformers' Llama layers that attend by
document; a test holds the count against what torch really keeps. The rest is arithmetic over the parameters
(Rajbhandari et al., 2020, arXiv:1910.02054, for what is sharded).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import LoraSection

CUDA_CONTEXT_BYTES = 1_000_000_000  # bytes that CUDA, its kernels and fragments of the allocator take
# Logits in one chunk of the LM head (`model/lm_head.py`), by device type. The forward pass holds 6 bytes a logit in
# bfloat16 and 8 in float32; the backward pass 4 and 8.
HEAD_CHUNK_FORWARD = {"cpu": 1 << 25, "cuda": 1 << 27}
HEAD_CHUNK_BACKWARD = {"cpu": 1 << 26, "cuda": 1 << 27}
STATE_BYTES_PER_WEIGHT = 16  # bytes a trained weight: itself, its gradient, and AdamW's two moments, all float32
NF4_BYTES_PER_WEIGHT = (
    1 / 2 + 1 / 64 + 4 / (64 * 256)
)  # bytes a weight in 4 bits: it, a byte for 64, and a float32 for 256 of these


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, or of one process on a CPU, at the height of a step.

    Attributes:
        state: weights, gradients and optimizer, its share where they are sharded.
        activations: what the backward pass needs.
        logits: the head's chunk of logits and its gradient.
        working: weights in compute precision or gathered from the other processes, and CUDA itself.
    """

    state: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All together."""
        return self.state + self.activations + self.logits + self.working


def estimate_memory(
    recipe: Recipe, shape: ModelShape, *, processes: int, micro_batch: int, checkpointing: bool, on_gpu: bool,
    supervised: float = 1.0,
) -> Memory:  # fmt: skip
    """The memory of a step of `micro_batch` rows (or pairs, of two sequences each) of full length.

    `supervised` is the share of the tokens that are learned.
    """
    bfloat16 = recipe.model.dtype == "bfloat16"
    sharded = recipe.distributed.shards(processes)
    tokens = micro_batch * recipe.data.sequence_len * (2 if recipe.method == "dpo" else 1)
    adapter = recipe.model.adapter
    trained = trained_parameters(adapter, shape)
    compute = 2 if bfloat16 else 0  # a float32 computation takes the weights as they are
    if sharded:  # of the blocks two are gathered at a time, of the embeddings all for the whole step
        working = (compute or 4) * (2 * shape.layer_parameters + shape.embedding_parameters)
        working += 4 * (shape.layer_parameters + shape.embedding_parameters)  # their whole gradients
    elif adapter is not None and adapter.type == "qlora":  # one matrix at a time, and the head
        working = (compute or 4) * shape.hidden_size * shape.intermediate_size
        working += compute * shape.vocab_size * shape.hidden_size
    else:
        working = compute * shape.parameters
    layer = tokens * layer_activations(shape, bfloat16)
    if adapter is not None and adapter.type == "dora":
        layer += tokens * dora_activations(adapter, shape, bfloat16)
        working += dora_working(shape, bfloat16)
    kept = shape.layers * (4 * tokens * shape.hidden_size if checkpointing else layer)
    logits = round(supervised * tokens) * shape.vocab_size
    device = "cuda" if on_gpu else "cpu"
    forward = (6 if bfloat16 else 8) * min(HEAD_CHUNK_FORWARD[device], logits)
    backward = (4 if bfloat16 else 8) * min(HEAD_CHUNK_BACKWARD[device], logits)
    return Memory(
        state=(STATE_BYTES_PER_WEIGHT * trained + frozen_bytes(adapter, shape)) // (processes if sharded else 1),
        activations=kept + layer,  # one layer more: recomputed, or on its way back
        logits=max(forward, backward) + 4 * shape.vocab_size * shape.hidden_size,
        working=working + (CUDA_CONTEXT_BYTES if on_gpu else 0),
    )


def layer_activations(shape: ModelShape, bfloat16: bool) -> int:
    """Bytes that autograd keeps of one decoder layer for each token.

    Norms compute in float32; the products keep their inputs, attention its queries, keys, values, normalizer and
    result (run by run, and the runs together), the gated MLP four tensors of its inner width.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = queries * 3 / 2 + keys + 2 * shape.intermediate_size
    inner = 26 * shape.hidden_size + 4 * wide if bfloat16 else 24 * shape.hidden_size + 8 * wide
    return math.ceil(inner) + 4 * shape.heads + 8


def trained_parameters(adapter: LoraSection | None, shape: ModelShape) -> int:
    """Weights that the optimizer changes."""
    return shape.parameters if adapter is None else adapter_parameters(adapter, shape)


def frozen_bytes(adapter: LoraSection | None, shape: ModelShape) -> int:
    """Bytes of the base beside an adapter: float32, but for the matrices of its layers under qlora."""
    if adapter is None:
        return 0
    if adapter.type != "qlora":
        return 4 * shape.parameters
    in_four_bits = shape.layers * sum(inputs * outputs for inputs, outputs in _matrices(shape).values())
    return 4 * (shape.parameters - in_four_bits) + math.ceil(NF4_BYTES_PER_WEIGHT * in_four_bits)


def adapter_parameters(section: LoraSection, shape: ModelShape) -> int:
    """Weights of an adapter: rank x (inputs + outputs) of every layer it stands on; under dora a length an output."""
    magnitudes = 1 if section.type == "dora" else 0
    sizes = [section.r * (inputs + outputs) + magnitudes * outputs for inputs, outputs in _adapted(section, shape)]
    return shape.layers * sum(sizes)


def dora_activations(section: LoraSection, shape: ModelShape, bfloat16: bool) -> int:
    """Bytes that autograd keeps more of a decoder layer for each token: two results of every layer that is scaled."""
    return (4 if bfloat16 else 8) * sum(outputs for _, outputs in _adapted(section, shape))


def dora_working(shape: ModelShape, bfloat16: bool) -> int:
    """Bytes that peft takes to measure the outputs of the widest layer: it makes the update's matrix from that of ones,
    and adds it to the weights."""
    wide, narrow = shape.intermediate_size, shape.hidden_size
    square, matrix = wide * wide, wide * narrow
    return max(6 * square + 2 * matrix, 2 * square + 12 * matrix) if bfloat16 else 4 * square + 12 * matrix


def _adapted(section: LoraSection, shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of a decoder layer's matrices that have an adapter."""
    sizes, targets = _matrices(shape), section.target_modules
    names = sizes if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    last = [name.rsplit(".", 1)[-1] for name in names]
    return [sizes[name] for name in last if name in sizes]


def _matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a decoder layer's matrices."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
