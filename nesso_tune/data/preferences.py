"""What is suspicious in preference data: answers that differ in length alone, contradictions, wrong languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nesso_tune.data.documents import Documents, Ints
from nesso_tune.errors import DataError, Problem
from nesso_tune.recipes.data import Limit, PreferenceSection

SAYS = {  # of each figure: what it means, and what can be done
    "length_predicts": ("{value:.0%} of the choices can be told from the answers' length alone ({side})",
                        "the model will learn length: balance the pairs, or use loss sigmoid_norm or ld_alpha"),
    "length_ratio": ("chosen answers are {value:.2f} times as long as rejected ones, or the other way round",
                     "balance the pairs, or use loss sigmoid_norm or ld_alpha"),
    "same_answers": ("in {value:.1%} of the rows both answers are the same", "look at how the pairs were made"),
    "conflicting": ("in {value:.1%} of the pairs the chosen answer is rejected elsewhere for the same prompt",
                    "decide for one of the two: see `conflicting_examples` in data_report.json"),
    "language_mismatch": ("in {value:.1%} of the pairs an answer is in another language than the prompt",
                          "see `language_mismatch_examples` in data_report.json"),
    "too_long": ("in {value:.1%} of the rows an answer does not fit into data.sequence_len", "raise it"),
}  # fmt: skip
EXAMPLES = 5


def preference_figures(documents: Documents, kept: Ints, dropped: Mapping[str, int], rows: int) -> dict[str, Any]:
    """Figures of the pairs that are kept, and of those that were dropped for what they are.

    Returns:
        `pairs`; `chosen_tokens` and `rejected_tokens` (means); `chosen_longer` and `equal_length` (shares);
        `length_predicts`: accuracy of the better of the two rules "longer" and "shorter", ties counted half;
        `length_ratio`: of the means, the larger by the smaller; `conflicting`, `language_mismatch` (shares of pairs,
        each with `…_examples`); `same_answers`, `too_long` (shares of rows read).
    """
    sizes = np.diff(documents.offsets).reshape(-1, 3)[kept]
    chosen, rejected = sizes[:, 1], sizes[:, 2]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    told = longer + equal / 2
    means = float(chosen.mean()), float(rejected.mean())
    better, worse = documents.identities[kept, 2], documents.identities[kept, 3]
    conflicts = np.flatnonzero(np.isin(better, worse) | np.isin(worse, better))
    foreign = np.flatnonzero(documents.mismatched[kept])
    return {
        "pairs": len(kept),
        "chosen_tokens": round(means[0], 1),
        "rejected_tokens": round(means[1], 1),
        "chosen_longer": round(longer, 4),
        "equal_length": round(equal, 4),
        "length_predicts": round(max(told, 1 - told), 4),
        "length_ratio": round(max(means) / max(min(means), 1e-9), 4),
        "conflicting": round(len(conflicts) / len(kept), 4),
        "conflicting_examples": [documents.place(kept[i]) for i in conflicts[:EXAMPLES]],
        "language_mismatch": round(len(foreign) / len(kept), 4),
        "language_mismatch_examples": [documents.place(kept[i]) for i in foreign[:EXAMPLES]],
        "same_answers": round(dropped.get("chosen_equals_rejected", 0) / max(1, rows), 4),
        "too_long": round(dropped.get("too_long", 0) / max(1, rows), 4),
    }


def check_preferences(figures: Mapping[str, Any], limits: PreferenceSection) -> list[str]:
    """What is to be said of preference data.

    Raises:
        DataError: with all that the recipe does not accept.
    """
    warnings: list[str] = []
    refused: list[Problem] = []
    for name, (what, remedy) in SAYS.items():
        limit: Limit = getattr(limits, name)
        value = figures[name]
        side = "longer" if figures["chosen_longer"] + figures["equal_length"] / 2 >= 0.5 else "shorter"
        said = what.format(value=value, side=f"the {side} is chosen")
        if limit.fail is not None and value >= limit.fail:
            refused.append(Problem("data.preferences", f"{said}; {name} fails from {limit.fail:g}", remedy))
        elif limit.warn is not None and value >= limit.warn:
            warnings.append(f"{said}: {remedy}")
    if refused:
        raise DataError(refused)
    return warnings
