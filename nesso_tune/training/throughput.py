"""How fast a run is, and how much memory it takes: measured from line to line, without waiting for the device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nesso_tune.planning.hardware import bf16_peak

SQUARED_LENGTHS = "squared_lengths"  # of a batch: the sum of its documents' squared lengths


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations that training a model takes, by what they grow with.

    After Chowdhery et al., 2022 (PaLM, arXiv:2204.02311, appendix B): a weight that is multiplied takes 2 for each
    token in the forward pass and 4 in the backward pass, and attention 12 x layers x width x length for each token of
    a document. Only what must be computed is counted:

        6 x (weights of the blocks) x tokens + 6 x (weights of the head) x supervised tokens
        + 12 x layers x width x (sum of squared document lengths) / 2

    Documents of a packed row do not see each other, and no token sees what comes after it: hence the sum over
    documents, and the half. A pair's prompt counts once for both answers. The head scores learned positions alone; an
    embedding is looked up, not multiplied. Under an adapter the frozen weights have no gradient: 4 instead of 6 for
    them, and 6 for the adapter's own. Padding, recomputation (gradient checkpointing), unpacking of quantised weights
    and the optimizer are not counted.

    Attributes:
        token: for each token that is read.
        supervised: for each supervised token, besides.
        square: for each squared token of a document's length.
    """

    token: float
    supervised: float
    square: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainingFlops:
        """Those of a whole model, before an adapter is put into it."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        blocks = sum(_multiplied(module) for module in model.modules() if module is not head)
        heads, layers, head_dim = (_size(config, n) for n in ("num_attention_heads", "num_hidden_layers", "head_dim"))
        head_dim = head_dim or (_size(config, "hidden_size") // heads if heads else 0)
        return cls(6 * blocks, 6 * _multiplied(head), 12 * layers * heads * head_dim / 2)

    def under_adapter(self, trained: int) -> TrainingFlops:
        """The same where `trained` weights of an adapter learn and all others are frozen."""
        return replace(self, token=self.token * 4 / 6 + 6 * trained, supervised=self.supervised * 4 / 6)


def _size(config: Any, name: str) -> int:
    """A size of a configuration; 0 where it has none, or one for each layer."""
    try:
        return getattr(config, name, None) or 0
    except Exception:  # transformers' own, of a size that differs between layers
        return 0


def _multiplied(module: nn.Module | None) -> int:
    """Weights of a linear layer; by its sizes, since quantised ones are packed."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, Conv1D) else 0


@dataclass(frozen=True)
class AttentionCostCollator:
    """A collator that also says how much attention a batch takes, for `Throughput.add`."""

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), SQUARED_LENGTHS: sum(map(squared_lengths, rows))}


def squared_lengths(row: Mapping[str, Any]) -> int:
    """Twice the pairs of tokens of which one attends to the other: squared lengths of the documents in a row.

    Of a preference pair, both answers with the prompt before them, less the prompt's own that is in both.
    """
    if "seq_lengths" in row:
        return sum(int(length) ** 2 for length in row["seq_lengths"])
    prompt, chosen, rejected = (len(row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return (prompt + chosen) ** 2 + (prompt + rejected) ** 2 - prompt**2


class Throughput:
    """What a log line says of speed and memory, counted since the line before it.

    Evaluating, saving and profiling are no time of training: they are added to `paused`.
    """

    def __init__(self, operations: TrainingFlops) -> None:
        self._operations, self._peak = operations, device_peak()
        self.paused = 0.0  # seconds
        self._tokens_before = self._supervised_before = 0  # of all processes, at the last line
        self._restart(0, 0)

    def begin(self, trainer: Any) -> None:
        """Starts where training starts or goes on."""
        tokens, supervised = trainer.sum_over_processes(_counts(trainer)).tolist()
        self._restart(int(tokens), int(supervised))

    def add(self, squares: int) -> None:
        """Takes a micro batch, by what `squared_lengths` says of its rows."""
        self._squares += squares

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the time until each is there is noted."""
        source = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._waited += time.monotonic() - began
            yield batch

    def line(self, trainer: Any) -> dict[str, int | float]:
        """The figures of a log line; the next one counts from here. Every process calls this.

        Returns:
            `tokens` and `supervised_tokens`: of the whole run so far, over all processes.
            `tokens_per_second`, `supervised_tokens_per_second`: since the last line, over all processes.
            `mfu`: operations a second of a device over its dense bfloat16 peak; only where the GPU is a known one.
            `peak_memory_gb`: 10^9 bytes, the most since the process began, on the process that has most; what torch
            allocated on a GPU, what is resident on a CPU.
            `data_wait_share`: share of the time since the last line in which the process that waited longest waited
            for its next batch.
        """
        busy = max(time.monotonic() - self._since - self.paused, 1e-9)
        own = [*_counts(trainer).tolist(), self._squares, self._waited, peak_memory()]
        device = trainer.accelerator.device
        each = trainer.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=device)).tolist()
        tokens, supervised, squares = (int(sum(process[i] for process in each)) for i in range(3))
        waits, memory = (max(process[i] for process in each) for i in (3, 4))
        read, learned = tokens - self._tokens_before, supervised - self._supervised_before
        line: dict[str, int | float] = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": round(read / busy, 1),
            "supervised_tokens_per_second": round(learned / busy, 1),
            "peak_memory_gb": round(memory / 1e9, 3),
            "data_wait_share": round(min(waits / busy, 1.0), 4),
        }
        if self._peak is not None:
            needed = self._operations
            done = needed.token * read + needed.supervised * learned + needed.square * squares
            line["mfu"] = round(done / (busy * len(each) * self._peak), 4)
        self._restart(tokens, supervised)
        return line

    def _restart(self, tokens: int, supervised: int) -> None:
        self._since, self.paused = time.monotonic(), 0.0
        self._tokens_before, self._supervised_before = tokens, supervised
        self._squares, self._waited = 0, 0.0  # of this process


def _counts(trainer: Any) -> torch.Tensor:
    """Tokens and supervised tokens of this process so far, [2]."""
    return torch.tensor([trainer.track.tokens, trainer.track.supervised_tokens], dtype=torch.float64)


def device_peak() -> float | None:
    """TrainingFlops a second that this process's device does at most, dense in bfloat16; None where it is not known."""
    teraflops = bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if teraflops is None else teraflops * 1e12


def peak_memory() -> int:
    """Bytes at the height of this process so far: allocated by torch on its GPU, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # Linux counts in KiB
