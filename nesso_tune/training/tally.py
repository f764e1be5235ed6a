"""Sums per language, kept on the device and added up over all processes when a line is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes


class Tally:
    """Weighted means by name and language.

    Every value is added with a weight (tokens or pairs); a mean over the whole is the mean of all that was added, so
    the parts always add up to the whole.
    """

    def __init__(self, names: Sequence[str], languages: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names, self.languages = tuple(names), tuple(languages)
        self._sums = torch.zeros(len(self.names), len(self.languages), 2, dtype=torch.float64, device=device)

    def add(self, name: str, language_ids: Tensor, values: Tensor, weights: Tensor) -> None:
        """Adds values of one name; all tensors are one-dimensional and of the same length."""
        row = self._sums[self.names.index(name)]
        weights = weights.to(torch.float64)
        row[:, 0].index_add_(0, language_ids, values.detach().to(torch.float64) * weights)
        row[:, 1].index_add_(0, language_ids, weights)

    def means(self, reduce: Reduce = lambda tensor: tensor) -> dict[str, float]:
        """`name` and `name/code` for every language seen; names without anything added are left out."""
        sums = reduce(self._sums.clone()).cpu()
        out: dict[str, float] = {}
        for i, name in enumerate(self.names):
            weight = sums[i, :, 1]
            if weight.sum() == 0:
                continue
            out[name] = float(sums[i, :, 0].sum() / weight.sum())
            for j, code in enumerate(self.languages):
                if weight[j] > 0:
                    out[f"{name}/{code}"] = float(sums[i, j, 0] / weight[j])
        return out

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
