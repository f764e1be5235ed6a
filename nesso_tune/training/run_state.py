"""The part of a run's state that a checkpoint holds beside weights, optimizer, random states and `TrainerState`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nesso_tune.training.evaluator import BestCheckpoint
from nesso_tune.training.grouped_metrics import GroupedMetrics
from nesso_tune.training.numerical_checks import SpikeGuard


@dataclass
class RunState:
    """Counters and running statistics of this rank, saved as `counters-RANK.json` of a checkpoint.

    Attributes:
        metrics: training metrics since the last log line.
        spike_guard: losses and gradient norms of the last steps.
        best: the best evaluation; None if the run keeps its last weights.
        tokens, supervised_tokens: tokens that this rank has trained on.
        earlier_seconds: training time of earlier sessions.
    """

    metrics: GroupedMetrics
    spike_guard: SpikeGuard
    best: BestCheckpoint | None = None
    tokens: int = 0
    supervised_tokens: int = 0
    earlier_seconds: float = 0.0
    _started: float = field(default_factory=time.monotonic, repr=False)

    @property
    def seconds(self) -> float:
        """Training time in seconds, earlier sessions included."""
        return self.earlier_seconds + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON data, exact."""
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self.seconds,
            "tally": self.metrics.state_dict(),
            "usual": self.spike_guard.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned. `usual` and `best` are optional: older checkpoints lack them."""
        self.tokens, self.supervised_tokens = state["tokens"], state["supervised_tokens"]
        self.earlier_seconds = state["seconds"]
        self.metrics.load_state_dict(state["tally"])
        self.spike_guard.load_state_dict(state.get("usual") or {})
        if self.best is not None:
            self.best.load_state_dict(state.get("best"))


def reshard_state(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The state that a rank resumes with, from the `RunState.state_dict` of each rank that saved.

    With the same world size this is the rank's own state. Otherwise rank 0 continues with the sum of all counters and
    the other ranks with zeros.
    """
    if len(states) == world_size:
        return dict(states[rank])
    names = ("tokens", "supervised_tokens")
    counts = {name: sum(state[name] for state in states) if rank == 0 else 0 for name in names}
    sums = torch.tensor([state["tally"] for state in states], dtype=torch.float64).sum(dim=0)
    metrics = sums if rank == 0 else torch.zeros_like(sums)
    seconds = max(state["seconds"] for state in states)
    replicated = {name: states[0].get(name) for name in ("usual", "best")}  # equal on all ranks
    return {**counts, "seconds": seconds, "tally": metrics.tolist(), **replicated}
