"""Weighted means of metrics over everything, per language and per source, accumulated on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nesso_tune.data.token_store import Documents

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


class GroupedMetrics:
    """Weighted means of named metrics by group.

    Every value is added with a weight, a number of tokens or pairs. The mean over all groups is the weighted mean of
    the group means. Sums are accumulated in float64 on the device; only `means` synchronises with it.

    Args:
        spec: the metrics.
        groups: the languages and sources.
        device: of the values that are added.
    """

    def __init__(self, spec: MetricSpec, groups: Groups, device: torch.device | str = "cpu") -> None:
        self.spec, self.groups = spec, groups
        # [metric, group, (weighted sum of the values, sum of the weights)]
        self._sums = torch.zeros(len(spec.means), len(groups), 2, dtype=torch.float64, device=device)

    def add(self, name: str, group_ids: Tensor, values: Tensor, weights: Tensor) -> None:
        """Adds values of one metric.

        Args:
            name: of the metric.
            group_ids, values, weights: one-dimensional and of the same length.
        """
        row = self._sums[self.spec.means.index(name)]
        weights = weights.to(torch.float64)
        row[:, 0].index_add_(0, group_ids, values.detach().to(torch.float64) * weights)
        row[:, 1].index_add_(0, group_ids, weights)

    def means(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """`name`, `name/LANGUAGE` and, with several sources, `name/source/NAME`; only groups with values.

        Args:
            reduce: sums a tensor over all processes.
        """
        sums = reduce(self._sums.clone()).cpu()
        out: dict[str, float] = {}
        for i, name in enumerate(self.spec.means):
            for suffix, groups in self._subsets(name):
                total, weight = sums[i, groups].sum(dim=0).tolist()
                if weight > 0:
                    out[f"{name}{suffix}"] = total / weight
        for name, terms in self.spec.weighted_sums.items():
            for suffix, _ in self._subsets(name):
                if all(f"{term}{suffix}" in out for term in terms):
                    out[f"{name}{suffix}"] = sum(weight * out[f"{term}{suffix}"] for term, weight in terms.items())
        return out

    def _subsets(self, name: str) -> Iterator[tuple[str, list[int]]]:
        return islice(self.groups.subsets(), 1 if name in self.spec.ungrouped else None)

    def reset(self) -> None:
        """Sets all sums and weights to zero."""
        self._sums.zero_()

    def state_dict(self) -> list[list[list[float]]]:
        """The exact sums as nested lists, [metric, group, 2]."""
        return self._sums.cpu().tolist()

    def load_state_dict(self, state: list[list[list[float]]]) -> None:
        """Restores the sums from `state_dict`."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))


@dataclass(frozen=True)
class MetricSpec:
    """Names of the metrics that `GroupedMetrics` reports.

    Attributes:
        means: weighted means.
        weighted_sums: sums of such means, as {name: {mean: weight}}.
        ungrouped: metrics that are reported over everything only, because they are not means over languages or sources.
    """

    means: tuple[str, ...]
    weighted_sums: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ungrouped: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics that are reported over everything."""
        return (*self.weighted_sums, *self.means)


@dataclass(frozen=True)
class Groups:
    """The languages and sources of some data. A group is one pair of them."""

    languages: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, *stores: Documents) -> Groups:
        """The groups of some tokenized documents, in a fixed order."""
        languages = sorted({code for documents in stores for code in documents.language_names})
        sources = dict.fromkeys(name for documents in stores for name in documents.source_names)
        return cls(tuple(languages), tuple(sources) or ("",))

    def __len__(self) -> int:
        return len(self.languages) * len(self.sources)

    def index(self, language: str, source: str) -> int:
        """The index of a group."""
        return self.languages.index(language) * len(self.sources) + self.sources.index(source)

    def subsets(self) -> Iterator[tuple[str, list[int]]]:
        """(suffix of a metric's name, indices of its groups): all, each language, and each of several sources."""
        width = len(self.sources)
        yield "", list(range(len(self)))
        for i, code in enumerate(self.languages):
            yield f"/{code}", list(range(i * width, (i + 1) * width))
        for i, name in enumerate(self.sources if width > 1 else ()):
            yield f"/source/{name}", list(range(i, len(self), width))


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every process."""
    summed: Any = accelerator.reduce(tensor.to(accelerator.device), reduction="sum")
    return summed
