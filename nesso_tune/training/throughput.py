"""Training speed, model FLOPs utilization and peak memory of each log line, measured without device synchronisation."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nesso_tune.planning.hardware import bf16_peak
from nesso_tune.training.run_state import RunState

SQUARED_LENGTHS = "squared_lengths"  # key of a batch: the sum of its squared document lengths
WHOLE_SEQUENCES = "whole_sequences"  # key of a batch: what other tools compute for it, as of `whole_sequences`


class Throughput:
    """Speed and memory since the last log line.

    Args:
        flops: of the model in training.
        accelerator: gathers the measurements of all processes.
        state: has the token counts of this process.
    """

    def __init__(self, flops: TrainingFlops, accelerator: Accelerator, state: RunState) -> None:
        self._flops, self._accelerator, self._state = flops, accelerator, state
        self._peak = device_peak()
        self._paused_seconds = 0.0
        self._last_tokens = self._last_supervised = 0  # of all processes, at the last line
        self._whole: list[int] = []
        self._restart(0, 0)

    def start(self) -> None:
        """Starts the measurement when training starts or resumes. Every process must call this."""
        counts = torch.tensor(self._counts(), dtype=torch.float64, device=self._accelerator.device)
        tokens, supervised = self._accelerator.reduce(counts, reduction="sum").tolist()
        self._restart(int(tokens), int(supervised))

    def add(self, squares: int, whole: tuple[int, int]) -> None:
        """Adds the `squared_lengths` and the `whole_sequences` of a micro batch."""
        self._squares += squares
        self._whole = [total + one for total, one in zip(self._whole, whole, strict=True)]

    def time_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the same batches, and measures the time spent waiting for each."""
        source = iter(batches)
        while True:
            start = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - start
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of a block, such as an evaluation or a save, from the training time."""
        start = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - start

    def measure(self) -> dict[str, int | float]:
        """The metrics of a log line. The next line is measured from here. Every process must call this.

        Returns:
            `tokens`, `supervised_tokens`: of the whole run so far, over all processes.
            `tokens_per_second`, `supervised_tokens_per_second`: since the last line, over all processes.
            `mfu`, `mfu_common`: model FLOP/s per device over the dense bfloat16 peak of the device, by our count and by
            the one of other tools; only for known GPUs.
            `peak_memory_gb`: in 10^9 bytes, since the process started, maximum over processes: memory allocated by
            torch on a GPU, resident memory on a CPU.
            `data_wait_share`: share of the training time since the last line that was spent waiting for batches,
            maximum over processes.
        """
        busy = max(time.monotonic() - self._since - self._paused_seconds, 1e-9)
        own = [*self._counts(), self._squares, *self._whole, self._waited, peak_memory()]
        device = self._accelerator.device
        each = self._accelerator.gather(torch.tensor([own], dtype=torch.float64, device=device)).tolist()
        tokens, supervised, squares, *whole = (int(sum(process[i] for process in each)) for i in range(5))
        waited, memory = (max(process[i] for process in each) for i in (5, 6))
        new_tokens, new_supervised = tokens - self._last_tokens, supervised - self._last_supervised
        line: dict[str, int | float] = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": round(new_tokens / busy, 1),
            "supervised_tokens_per_second": round(new_supervised / busy, 1),
            "peak_memory_gb": round(memory / 1e9, 3),
            "data_wait_share": round(min(waited / busy, 1.0), 4),
        }
        if self._peak is not None:
            flops = self._flops
            done = flops.token * new_tokens + flops.supervised * new_supervised + flops.square * squares
            available = busy * len(each) * self._peak
            line["mfu"] = round(done / available, 4)
            line["mfu_common"] = round(flops.common(*whole) / available, 4)
        self._restart(tokens, supervised)
        return line

    def _restart(self, tokens: int, supervised: int) -> None:
        self._since, self._paused_seconds = time.monotonic(), 0.0
        self._last_tokens, self._last_supervised = tokens, supervised
        self._squares, self._whole, self._waited = 0, [0, 0], 0.0  # of this process

    def _counts(self) -> list[int]:
        return [self._state.tokens, self._state.supervised_tokens]


@dataclass(frozen=True)
class TrainingFlops:
    """Model FLOPs of training.

    After Chowdhery et al., 2022 (PaLM, arXiv:2204.02311, appendix B): each weight of a matrix multiplication takes 2
    FLOPs per token in the forward pass and 4 in the backward pass; attention takes 12 x layers x width x length per
    token of a document. Only necessary operations count:

        6 x (weights of the blocks) x tokens + 6 x (weights of the head) x supervised tokens
        + 12 x layers x width x (sum of squared document lengths) / 2

    Attention is causal and does not cross the documents of a packed row, hence the half and the sum over documents.
    The prompt of a preference pair counts once for both answers. The head computes supervised positions only, and an
    embedding is a lookup without FLOPs. With an adapter, frozen weights have no gradient: they take 4 FLOPs instead of
    6, and the weights of the adapter take 6. Padding, recomputation (gradient checkpointing), dequantisation and the
    optimizer do not count.

    Attributes:
        token: FLOPs per token.
        supervised: additional FLOPs per supervised token.
        square: FLOPs per squared token of document length.
    """

    token: float
    supervised: float
    square: float

    def common(self, tokens: int, squares: int) -> float:
        """The FLOPs of `whole_sequences` as other tools count them: the head on every token, and full attention."""
        return (self.token + self.supervised) * tokens + 2 * self.square * squares

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainingFlops:
        """The FLOPs of full fine-tuning; call this before an adapter is added."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        blocks = sum(_multiplied(module) for module in model.modules() if module is not head)
        heads, layers, head_dim = (_size(config, n) for n in ("num_attention_heads", "num_hidden_layers", "head_dim"))
        head_dim = head_dim or (_size(config, "hidden_size") // heads if heads else 0)
        return cls(6 * blocks, 6 * _multiplied(head), 12 * layers * heads * head_dim / 2)

    def under_adapter(self, trained: int) -> TrainingFlops:
        """The FLOPs of training `trained` adapter weights with all other weights frozen."""
        return replace(self, token=self.token * 4 / 6 + 6 * trained, supervised=self.supervised * 4 / 6)


def _size(config: Any, name: str) -> int:
    """A size of a configuration; 0 if it has none, or one per layer."""
    try:
        return getattr(config, name, None) or 0
    except Exception:  # raised by transformers for a size that differs between layers
        return 0


def _multiplied(module: nn.Module | None) -> int:
    """Number of weights of a linear layer, from its shape: quantised weights are stored packed."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, Conv1D) else 0


@dataclass(frozen=True)
class AttentionCostCollator:
    """Wraps a collator and adds `squared_lengths` and `whole_sequences` of the rows to each batch, for `Throughput`."""

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokens, squares = (sum(counts) for counts in zip(*map(whole_sequences, rows), strict=True))
        return {
            **self.collate(rows), SQUARED_LENGTHS: sum(map(squared_lengths, rows)), WHOLE_SEQUENCES: (tokens, squares),
        }  # fmt: skip


def squared_lengths(row: Mapping[str, Any]) -> int:
    """Sum of the squared document lengths of a row: about twice the number of (query, key) pairs of causal attention.

    For a preference pair: both answers with the prompt before them, minus the prompt, which is computed once.
    """
    if "seq_lengths" in row:
        return sum(int(length) ** 2 for length in row["seq_lengths"])
    prompt, chosen, rejected = (len(row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return (prompt + chosen) ** 2 + (prompt + rejected) ** 2 - prompt**2


def whole_sequences(row: Mapping[str, Any]) -> tuple[int, int]:
    """Sum of the lengths, and of their squares, of the sequences that other tools compute for a row.

    A packed row is one sequence; a preference pair is two, each with the prompt.
    """
    if "seq_lengths" in row:
        lengths = [sum(row["seq_lengths"])]
    else:
        prompt, chosen, rejected = (len(row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids"))
        lengths = [prompt + chosen, prompt + rejected]
    return sum(lengths), sum(length**2 for length in lengths)


def device_peak() -> float | None:
    """Dense bfloat16 peak of this process's device in FLOP/s; None if unknown."""
    teraflops = bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if teraflops is None else teraflops * 1e12


def peak_memory() -> int:
    """Peak memory of this process in bytes: allocated by torch on a GPU, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident  # Linux reports KiB
