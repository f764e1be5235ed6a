"""Estimates the peak memory of a training step per process, from the shape of the model.

Activations are counted tensor by tensor for transformers' Llama layers with document attention; a test compares the
count with the tensors that autograd saves. Sharded state follows ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import LoraSection

MEMORY_SAFE_SHARE = 0.7  # estimates up to this share of the GPU memory are trusted
CUDA_CONTEXT_BYTES = 1_000_000_000  # CUDA context, kernels and allocator fragmentation
# Logits per chunk of the LM head (`model/lm_head.py`), by device type. The forward pass needs 6 bytes per logit in
# bfloat16 and 8 in float32 (2 and 4 where it is compiled, which evaluations are not); the backward pass 4 and 8.
HEAD_CHUNK_FORWARD = {"cpu": 1 << 25, "cuda": 1 << 27}
HEAD_CHUNK_BACKWARD = {"cpu": 1 << 26, "cuda": 1 << 27}
# Bytes per trained weight of the two AdamW moments: float32, or one byte and a float32 per block of 256.
MOMENT_BYTES = {"adamw_torch_fused": 8.0, "adamw_torch": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}
MIN_BACKGROUND_BYTES = 100_000_000  # of a checkpoint; a smaller one is written in a fraction of a second
NF4_BYTES_PER_WEIGHT = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # 4 bits, one byte per block of 64, one float32 per 256 blocks


@dataclass(frozen=True)
class Memory:
    """Peak memory of a step in bytes, per process.

    Attributes:
        state: weights, gradients and optimizer state; one shard if sharded.
        activations: tensors saved for the backward pass.
        logits: one chunk of logits and the gradient of the LM head.
        working: weights in compute precision or gathered from other ranks, buckets of DDP, and the CUDA
            context; on a CPU, the copy from which a checkpoint is written.
    """

    state: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.state + self.activations + self.logits + self.working


def estimate_memory(
    recipe: Recipe, shape: ModelShape, *, shards: int, micro_batch: int, checkpointing: bool, on_gpu: bool,
    supervised: float = 1.0,
) -> Memory:  # fmt: skip
    """Memory of a step with `micro_batch` rows (DPO: pairs of two sequences) of length `data.sequence_len`.

    `shards` is the number of processes that the state is sharded over, 1 if it is not. `supervised` is the share of
    supervised tokens.
    """
    bfloat16 = recipe.model.dtype == "bfloat16"
    sharded = shards > 1
    tokens = micro_batch * recipe.data.sequence_len * (2 if recipe.method == "dpo" else 1)
    adapter = recipe.model.adapter
    trained = trained_parameters(adapter, shape)
    compute = 2 if bfloat16 else 0  # float32 needs no cast copy
    if sharded:  # two layers at a time; the embeddings for the whole step
        working = (compute or 4) * (2 * shape.layer_parameters + shape.embedding_parameters)
        working += 4 * (shape.layer_parameters + shape.embedding_parameters)  # unsharded gradients
    elif adapter is not None:  # frozen weights need no cast copy, but trained rows one of the embedding and the head
        working = 2 * compute * shape.vocab_size * shape.hidden_size
        if adapter.type == "qlora":  # one dequantized matrix at a time
            working += (compute or 4) * shape.hidden_size * shape.intermediate_size
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
        state=(state_bytes(recipe, trained) + frozen_bytes(adapter, shape, compute or 4)) // shards,
        activations=kept + layer,  # plus one layer: recomputed, or its gradients
        logits=max(forward, backward) + 4 * shape.vocab_size * shape.hidden_size,
        working=working + (CUDA_CONTEXT_BYTES if on_gpu else copied_bytes(recipe, shape)),
    )


def layer_activations(shape: ModelShape, bfloat16: bool) -> int:
    """Bytes per token that autograd saves for one decoder layer.

    Norms compute in float32. Linear layers save their inputs; attention saves queries, keys, values, log-sum-exp and
    output (per document and concatenated); the gated MLP saves four tensors of its intermediate size.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = queries * 3 / 2 + keys + 2 * shape.intermediate_size
    inner = 26 * shape.hidden_size + 4 * wide if bfloat16 else 24 * shape.hidden_size + 8 * wide
    return math.ceil(inner) + 4 * shape.heads + 8


def state_bytes(recipe: Recipe, trained: int) -> int:
    """Bytes of trained weights and their gradients in float32, and of the optimizer's moments."""
    return math.ceil((8 + MOMENT_BYTES[recipe.train.optimizer]) * trained)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of a checkpoint: trained weights in float32 and the optimizer's moments."""
    trained = trained_parameters(recipe.model.adapter, shape)
    return math.ceil((4 + MOMENT_BYTES[recipe.train.optimizer]) * trained)


def copied_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the copy in host memory from which a checkpoint is written while training goes on; 0 without one."""
    if recipe.checkpoint is None or recipe.checkpoint.asynchronous is False:
        return 0
    size = checkpoint_bytes(recipe, shape)
    return size if recipe.checkpoint.asynchronous is True or size >= MIN_BACKGROUND_BYTES else 0


def trained_parameters(adapter: LoraSection | None, shape: ModelShape) -> int:
    """Number of trainable parameters."""
    return shape.parameters if adapter is None else adapter_parameters(adapter, shape)


def frozen_bytes(adapter: LoraSection | None, shape: ModelShape, precision: int = 4) -> int:
    """Bytes of the frozen base model under an adapter: `precision` per weight, or NF4 for the layers under qlora.

    The norms, which stay in float32, are not counted apart.
    """
    if adapter is None:
        return 0
    if adapter.type != "qlora":
        return precision * shape.parameters
    in_four_bits = shape.layers * sum(inputs * outputs for inputs, outputs in layer_matrices(shape).values())
    return precision * (shape.parameters - in_four_bits) + math.ceil(NF4_BYTES_PER_WEIGHT * in_four_bits)


def adapter_parameters(section: LoraSection, shape: ModelShape) -> int:
    """Parameters of an adapter: rank * (inputs + outputs) per target layer, plus one magnitude per output for dora."""
    magnitudes = 1 if section.type == "dora" else 0
    sizes = [section.r * (inputs + outputs) + magnitudes * outputs for inputs, outputs in _adapted(section, shape)]
    return shape.layers * sum(sizes)


def dora_activations(section: LoraSection, shape: ModelShape, bfloat16: bool) -> int:
    """Additional bytes per token that DoRA saves for a decoder layer: two outputs per target layer."""
    return (4 if bfloat16 else 8) * sum(outputs for _, outputs in _adapted(section, shape))


def dora_working(shape: ModelShape, bfloat16: bool) -> int:
    """Bytes that peft needs for the DoRA weight norm of the widest layer.

    peft computes the dense update by applying the adapter to an identity matrix, then adds it to the weights, all in
    float32.
    """
    wide, narrow = shape.intermediate_size, shape.hidden_size
    square, matrix = wide * wide, wide * narrow
    return max(6 * square + 2 * matrix, 2 * square + 16 * matrix) if bfloat16 else 4 * square + 12 * matrix


def _adapted(section: LoraSection, shape: ModelShape) -> list[tuple[int, int]]:
    """(inputs, outputs) of the target matrices of a decoder layer."""
    sizes, targets = layer_matrices(shape), section.target_modules
    names = sizes if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    last = [name.rsplit(".", 1)[-1] for name in names]
    return [sizes[name] for name in last if name in sizes]


def layer_matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the matrices of a decoder layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
