"""Holding rows out for evaluation, stratified by language."""

from __future__ import annotations

import numpy as np

from nesso_tune.data.documents import Ints
from nesso_tune.errors import RecipeError


def hold_out(languages: Ints, size: int | float, seed: int) -> tuple[Ints, Ints]:
    """Positions to train on and positions held out, both ascending.

    Args:
        languages: language index of every row.
        size: rows (int) or share (float) to hold out. Languages are held out in proportion; a share holds out at
            least one row of every language that has ten.
        seed: decides which rows.

    Raises:
        RecipeError: if nothing would be left to train on.
    """
    total = len(languages)
    if not size:
        return np.arange(total), np.zeros(0, dtype=np.int64)
    check_size(size, total)
    codes, counts = np.unique(languages, return_counts=True)
    rng = np.random.default_rng([seed, 7])
    chosen = [
        rng.choice(np.flatnonzero(languages == code), size=wanted, replace=False)
        for code, wanted in zip(codes, _shares(counts, size), strict=True)
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(np.int64)
    return np.setdiff1d(np.arange(total), held_out), held_out


def check_size(size: int | float, total: int) -> None:
    """Raises RecipeError if holding out `size` of `total` rows would leave nothing to train on."""
    if isinstance(size, int) and size and size >= total:
        raise RecipeError(
            "data.validation_size", f"{size:,} of {total:,} usable rows leave nothing to train on",
            f"hold out fewer, e.g. {max(1, total // 20)}, or a share like 0.05",
        )  # fmt: skip


def _shares(counts: Ints, size: int | float) -> list[int]:
    """How many rows each language gives, by largest remainders."""
    if isinstance(size, float):
        return [max(int(size * n), 1 if n >= 10 else 0) for n in counts]
    exact = size * counts / counts.sum()
    floors = np.floor(exact).astype(int)
    for i in np.argsort(floors - exact, kind="stable")[: size - floors.sum()]:
        floors[i] += 1
    return [int(n) for n in floors]
