"""Lower bound of the time of a training step, from its kernels, bytes and FLOPs, and the model FLOPs utilisation.

A roofline (Williams et al., 2009, doi:10.1145/1498765.1498785) kernel by kernel: a matrix product takes the time of its
FLOPs, in whole waves of tiles over the processors of the GPU; everything between the products the time of the bytes
that it reads and writes; no kernel less than `KERNEL_S`. The host launches kernels one after the other, which bounds
small micro batches. The counts are those of transformers' Llama layers with document attention and float32 residuals,
computed in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nesso_tune.planning.hardware import Gpu
from nesso_tune.planning.memory import HEAD_CHUNK_FORWARD, MOMENT_BYTES, layer_matrices, trained_parameters
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import Recipe

BANDWIDTH_SHARE = 0.83  # of the data sheet's, that kernels reach
LINK_SHARE = 0.75  # of the link to other GPUs
MACHINE_GPUS, NETWORK = 8, 25e9  # of a node, if unknown; bytes/s between nodes for each GPU
KERNEL_S, GAP_S = 2e-6, 0.7e-6  # shortest kernel, and the gap to the next one
LAUNCH_S = 5e-6  # of a kernel, on the host
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 256, 0.8), (64, 128, 0.75), (128, 64, 0.75))
PIPELINE_DEPTH = 256  # inner size that a tile loses to filling its pipeline
BACKWARD_ATTENTION = 2.5 / 0.8  # FLOPs of the backward pass of flash attention, and its rate, relative to the forward
LOGIT_BYTES = 16  # of a logit between the products of the LM head, in both passes
# Bytes per trained weight: gradient of a micro batch, cast to float32 and added up; AdamW with a norm and clipping.
GRADIENT_BYTES, ADAM_BYTES = 18, 24
CAST_BYTES = 6  # per weight: from float32 to bfloat16
DEQUANTIZE_BYTES = 2.5  # per weight in 4 bits, in each pass


@dataclass(frozen=True)
class LayerTraffic:
    """Kernels, and bytes per token, of a decoder layer between its products and its attention.

    Attributes:
        kernels: their number.
        hidden, heads, inner: bytes per element of the residual stream, of queries and keys, and of the gated MLP.
    """

    kernels: int
    hidden: float
    heads: float
    inner: float

    def bytes_per_token(self, shape: ModelShape) -> float:
        """Bytes that are read and written for a token."""
        heads = shape.head_dim * (shape.heads + shape.kv_heads)
        return self.hidden * shape.hidden_size + self.heads * heads + self.inner * shape.intermediate_size


# (forward, backward). Eager: counted operation by operation. Compiled: each norm with the residual before it, rotary
# embedding and gated activation as one kernel.
EAGER = LayerTraffic(40, 106, 36, 10), LayerTraffic(76, 286, 68, 18)
COMPILED = LayerTraffic(8, 28, 8, 6), LayerTraffic(14, 44, 8, 12)


@dataclass(frozen=True)
class Work:
    """What one process computes in an optimizer step.

    Attributes:
        tokens: of a micro batch, padding included.
        supervised: supervised tokens of a micro batch.
        document: mean document length over the tokens: sum of squared lengths / sum of lengths.
        row: length of a row.
        accumulation: micro batches per step.
        processes: number of processes.
        sharded, checkpointing, compiled: how they train.
        replicas: groups of processes that each hold the whole sharded state.
        per_node: processes on each node; None if unknown, then at most `MACHINE_GPUS`.
    """

    tokens: float
    supervised: float
    document: float
    row: int
    accumulation: int
    processes: int
    sharded: bool
    checkpointing: bool
    compiled: bool
    replicas: int = 1
    per_node: int | None = None

    @property
    def shards(self) -> int:
        """Number of processes that share a state; 1 if it is not sharded."""
        return self.processes // self.replicas if self.sharded else 1


@dataclass(frozen=True)
class StepBound:
    """Shortest time of an optimizer step on each GPU, in seconds.

    Attributes:
        seconds: of the step. Communication overlaps with computation, and launches with kernels.
        products, attention, traffic: matrix products; attention; kernels that only read and write memory.
        optimizer: the update, and the cast of the new weights.
        launches: of the host.
        communication: gathered weights and reduced gradients.
        mfu: model FLOPs utilisation (see `training/throughput.py`) at this time.
        mfu_common: the same as other tools count: the LM head on every token, and attention over whole rows.
    """

    seconds: float
    products: float
    attention: float
    traffic: float
    optimizer: float
    launches: float
    communication: float
    mfu: float
    mfu_common: float


def step_bound(recipe: Recipe, shape: ModelShape, gpu: Gpu | None, work: Work) -> StepBound | None:
    """The bound of a step; None if the speeds of the GPU are unknown, or the run computes in float32."""
    if gpu is None or not gpu.teraflops or not gpu.bandwidth or recipe.model.dtype != "bfloat16":
        return None
    bound = _Roofline(recipe, shape, gpu, work)
    micro = [work.accumulation * seconds for seconds in bound.micro_batch()]
    products, attention, traffic, launches = micro
    optimizer, communication = bound.optimizer(), bound.communication()
    seconds = max(products + attention + traffic, launches, communication) + optimizer
    flops, common = model_flops(recipe, shape, work)
    peak = gpu.teraflops * 1e12 * seconds
    return StepBound(
        seconds, products, attention, traffic, optimizer, launches, communication, flops / peak, common / peak
    )


def model_flops(recipe: Recipe, shape: ModelShape, work: Work) -> tuple[float, float]:
    """Model FLOPs of a step of one process: ours, and as other tools count."""
    matrices = shape.layers * sum(inputs * outputs for inputs, outputs in layer_matrices(shape).values())
    token, head = 6.0 * matrices, 6.0 * shape.vocab_size * shape.hidden_size
    if recipe.model.adapter is not None:
        trained = trained_parameters(recipe.model.adapter, shape)
        token, head = token * 4 / 6 + 6 * trained, head * 4 / 6
    width = 12 * shape.layers * shape.heads * shape.head_dim
    ours = token * work.tokens + head * work.supervised + width * work.tokens * work.document / 2
    common = (token + head + width * work.row) * work.tokens
    return work.accumulation * ours, work.accumulation * common


class _Roofline:
    """Seconds of the parts of a step on one GPU."""

    def __init__(self, recipe: Recipe, shape: ModelShape, gpu: Gpu, work: Work) -> None:
        assert gpu.teraflops
        assert gpu.bandwidth
        self._recipe, self._shape, self._gpu, self._work = recipe, shape, gpu, work
        self._flops = gpu.teraflops * 1e12
        self._bandwidth = BANDWIDTH_SHARE * gpu.bandwidth
        self._adapter = recipe.model.adapter
        self._trained = trained_parameters(self._adapter, shape)
        self._products = self._traffic = 0.0
        self._kernels = 0.0

    def micro_batch(self) -> tuple[float, float, float, float]:
        """Products, attention, traffic and launches of a micro batch."""
        work, layers, (forward, backward) = self._work, self._shape.layers, COMPILED if self._work.compiled else EAGER
        passes = (forward, backward, *([forward] if work.checkpointing else []))
        for each in passes:
            self._add_traffic(layers * each.bytes_per_token(self._shape) * work.tokens, layers * each.kernels)
        for inputs, outputs in layer_matrices(self._shape).values():
            for product in self._products_of(work.tokens, inputs, outputs):
                self._add_product(product, layers)
        self._add_head()
        self._add_adapter()
        self._add_traffic(GRADIENT_BYTES * self._trained, 3 * layers * (7 if self._adapter is None else 14))
        flops = 4 * self._shape.heads * self._shape.head_dim * work.tokens * work.document / 2
        times = 1 + BACKWARD_ATTENTION + work.checkpointing
        attention = layers * times * flops / (self._gpu.attention_share * self._flops)
        self._kernels += 3 * layers
        return self._products, attention, self._traffic, LAUNCH_S * self._kernels

    def optimizer(self) -> float:
        """The update of the weights, after which they are cast again."""
        work = self._work
        moments = 2 * MOMENT_BYTES[self._recipe.train.optimizer]  # read and written
        update = (ADAM_BYTES + moments) * self._trained / work.shards
        return (update + CAST_BYTES * self._trained) / self._bandwidth

    def communication(self) -> float:
        """Full weights for both passes of each micro batch, if sharded; gradients once a step.

        With replicas, both stay in a node, and the nodes add up the gradient of each shard.
        """
        work = self._work
        if work.processes == 1 or not self._gpu.link:
            return 0.0
        network = LINK_SHARE * min(self._gpu.link, NETWORK)
        across_nodes = work.processes // work.replicas > (work.per_node or MACHINE_GPUS)
        link = network if across_nodes else LINK_SHARE * self._gpu.link
        gradients = (4 if work.sharded else 8) * self._trained
        weights = gathered_bytes(self._shape) * work.accumulation if work.sharded else 0
        group, across = work.processes // work.replicas, 8 * self._trained / work.shards
        inside = (gradients + weights) * (group - 1) / group / link
        return inside + across * (work.replicas - 1) / work.replicas / network

    def _products_of(self, tokens: float, inputs: int, outputs: int) -> list[tuple[float, float, float]]:
        """(rows, columns, inner size) of the products of a matrix: forward, again, and both gradients."""
        forward, to_inputs, to_weights = (tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens)
        again = [forward] if self._work.checkpointing else []
        return [forward, *again, to_inputs, *([to_weights] if self._adapter is None else [])]

    def _add_head(self) -> None:
        """The LM head on supervised tokens, in chunks; its backward pass computes the logits again."""
        count, vocabulary, hidden = self._work.supervised, self._shape.vocab_size, self._shape.hidden_size
        if not count:
            return
        chunks = math.ceil(count * vocabulary / HEAD_CHUNK_FORWARD["cuda"])
        size, trains = count / chunks, self._adapter is None
        products = [(size, vocabulary, hidden)] * 2 + [(size, hidden, vocabulary)]
        for product in products + ([(vocabulary, hidden, size)] if trains else []):
            self._add_product(product, chunks)
        self._add_traffic(LOGIT_BYTES * count * vocabulary, 12 * chunks)
        if trains:  # the gradient of a chunk is added in float32
            self._add_traffic(10.0 * vocabulary * hidden * chunks, chunks)

    def _add_adapter(self) -> None:
        """The products of an adapter, which are bound by memory, and 4-bit weights that are expanded in each pass."""
        if self._adapter is None:
            return
        sizes = layer_matrices(self._shape).values()
        elements = self._shape.layers * sum(inputs + outputs for inputs, outputs in sizes)
        self._add_traffic(24.0 * elements * self._work.tokens, 13 * len(sizes) * self._shape.layers)
        if self._adapter.type == "qlora":
            weights = self._shape.layers * sum(inputs * outputs for inputs, outputs in sizes)
            passes = 3 if self._work.checkpointing else 2
            self._add_traffic(passes * DEQUANTIZE_BYTES * weights, passes * len(sizes) * self._shape.layers)

    def _add_product(self, sizes: tuple[float, float, float], count: int) -> None:
        rows, columns, inner = sizes
        moved = 2 * (rows * inner + inner * columns + rows * columns) / self._bandwidth
        self._products += count * (max(self._product(*sizes), moved, KERNEL_S) + GAP_S)
        self._kernels += count

    def _product(self, rows: float, columns: float, inner: float) -> float:
        """Seconds of a matrix product with the best tile, and perhaps with the inner size split over processors."""
        rate, processors = self._gpu.matmul_share * self._flops, max(1, self._gpu.processors)
        best = math.inf
        for height, width, efficiency in TILES:
            for split in (1, 2, 4, 8):
                waves = math.ceil(math.ceil(rows / height) * math.ceil(columns / width) * split / processors)
                flops = waves * processors * height * width * 2 * (inner / split + PIPELINE_DEPTH)
                partial = 6 * split * rows * columns / self._bandwidth if split > 1 else 0.0
                best = min(best, flops / (rate * efficiency) + partial)
        return best

    def _add_traffic(self, count: float, kernels: float) -> None:
        self._traffic += max(count / self._bandwidth + GAP_S * kernels, (KERNEL_S + GAP_S) * kernels)
        self._kernels += kernels


def gathered_bytes(shape: ModelShape) -> float:
    """Bytes in bfloat16 that sharding gathers for a micro batch: the layers in both passes, the embeddings once."""
    return 2.0 * (2 * shape.layers * shape.layer_parameters + shape.embedding_parameters)
