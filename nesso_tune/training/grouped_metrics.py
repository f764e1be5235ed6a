"""Sums per language and source, kept on the device and added up over all processes when a line is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from nesso_tune.data.token_store import Documents

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


@dataclass(frozen=True)
class Groups:
    """The languages and sources of some data; a group is one of each."""

    languages: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def of(cls, *all_of: Documents) -> Groups:
        """Those of documents, in a fixed order."""
        languages = sorted({code for documents in all_of for code in documents.language_names})
        sources = dict.fromkeys(name for documents in all_of for name in documents.source_names)
        return cls(tuple(languages), tuple(sources) or ("",))

    def __len__(self) -> int:
        return len(self.languages) * len(self.sources)

    def number(self, language: str, source: str) -> int:
        """The number of a group."""
        return self.languages.index(language) * len(self.sources) + self.sources.index(source)

    def parts(self) -> Iterator[tuple[str, list[int]]]:
        """What is added to a metric's name, and the groups that it is of: the whole, languages, several sources."""
        width = len(self.sources)
        yield "", list(range(len(self)))
        for i, code in enumerate(self.languages):
            yield f"/{code}", list(range(i * width, (i + 1) * width))
        for i, name in enumerate(self.sources if width > 1 else ()):
            yield f"/source/{name}", list(range(i, len(self), width))


@dataclass(frozen=True)
class MetricSpec:
    """What a tally reports.

    Attributes:
        means: names of weighted means.
        sums: weighted sums of such means: {name: {mean: weight}}.
        whole: names that are reported over everything only: they are no means over languages or sources.
    """

    means: tuple[str, ...]
    sums: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """All that is reported over everything."""
        return (*self.sums, *self.means)


class GroupedMetrics:
    """Weighted means by name and group.

    Every value is added with a weight (tokens or pairs); a mean over the whole is the mean of all that was added, so
    the parts always add up to the whole.
    """

    def __init__(self, figures: MetricSpec, groups: Groups, device: torch.device | str = "cpu") -> None:
        self.figures, self.names, self.groups = figures, figures.means, groups
        self._sums = torch.zeros(len(self.names), len(groups), 2, dtype=torch.float64, device=device)

    def add(self, name: str, group_ids: Tensor, values: Tensor, weights: Tensor) -> None:
        """Adds values of one name; all tensors are one-dimensional and of the same length."""
        row = self._sums[self.names.index(name)]
        weights = weights.to(torch.float64)
        row[:, 0].index_add_(0, group_ids, values.detach().to(torch.float64) * weights)
        row[:, 1].index_add_(0, group_ids, weights)

    def means(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """`name`, `name/code` for every language and `name/source/NAME` for every source, as far as they were seen."""
        sums = reduce(self._sums.clone()).cpu()
        out: dict[str, float] = {}
        for i, name in enumerate(self.names):
            for suffix, groups in self._parts_of(name):
                total, weight = sums[i, groups].sum(dim=0).tolist()
                if weight > 0:
                    out[f"{name}{suffix}"] = total / weight
        for name, means in self.figures.sums.items():
            for suffix, _ in self._parts_of(name):
                if all(f"{mean}{suffix}" in out for mean in means):
                    out[f"{name}{suffix}"] = sum(weight * out[f"{mean}{suffix}"] for mean, weight in means.items())
        return out

    def _parts_of(self, name: str) -> Iterator[tuple[str, list[int]]]:
        return islice(self.groups.parts(), 1 if name in self.figures.whole else None)

    def weight(self, name: str, reduce: Reduce = lambda tensor: tensor) -> int:
        """The whole weight that was added under a name."""
        return int(reduce(self._sums[self.names.index(name), :, 1].clone()).sum())

    def reset(self) -> None:
        """Starts anew."""
        self._sums.zero_()

    def state(self) -> list[list[list[float]]]:
        """The sums as plain data, exact."""
        return self._sums.cpu().tolist()

    def restore(self, state: list[list[list[float]]]) -> None:
        """Takes sums back from `state`."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))
