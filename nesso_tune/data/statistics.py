"""Statistics of the data that is kept: lengths, and biases of preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nesso_tune.data.token_store import Documents, IntArray
from nesso_tune.errors import DataError, Problem
from nesso_tune.recipes.sections import Limit, PreferenceSection

PREFERENCE_WARNINGS = {  # by statistic: what it means, and what to do
    "length_predicts": ("{value:.0%} of the preferences can be predicted from answer length alone ({side})",
                        "the model will learn length: balance the pairs, or use loss sigmoid_norm or ld_alpha"),
    "length_ratio": ("chosen and rejected answers differ in mean length by a factor of {value:.2f}",
                     "balance the pairs, or use loss sigmoid_norm or ld_alpha"),
    "same_answers": ("both answers are identical in {value:.1%} of the rows", "check how the pairs were generated"),
    "conflicting": ("in {value:.1%} of the pairs, the chosen answer is rejected elsewhere for the same prompt",
                    "keep one of the two: see `conflicting_examples` in data_report.json"),
    "language_mismatch": ("in {value:.1%} of the pairs, an answer is in another language than the prompt",
                          "see `language_mismatch_examples` in data_report.json"),
    "too_long": ("in {value:.1%} of the rows, an answer exceeds data.sequence_len", "raise it"),
}  # fmt: skip
_MAX_EXAMPLES = 5
_QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}


def length_histograms(documents: Documents, entries: IntArray) -> dict[str, Any]:
    """Histograms of lengths in tokens, per language. The length of a pair is that of its prompt and longer answer.

    Returns:
        `edges`: powers of two; `languages`: `counts` (bin i counts edges[i] <= length < edges[i + 1]), `mean` and
        quantiles by language code.
    """
    lengths = documents.sequence_lengths[entries]
    top = max(3, int(lengths.max(initial=1)).bit_length())
    edges = [2**i for i in range(top + 1)]
    languages = {}
    for i, name in enumerate(documents.language_names):
        own = lengths[documents.languages[entries] == i]
        if len(own):
            counts = np.histogram(own, edges)[0].tolist()
            quantiles = {label: int(np.quantile(own, q, method="lower")) for label, q in _QUANTILES.items()}
            languages[name] = {"counts": counts, "mean": round(float(own.mean()), 1), **quantiles}
    return {"edges": edges, "languages": dict(sorted(languages.items()))}


def preference_statistics(
    documents: Documents, kept: IntArray, dropped: Mapping[str, int], rows: int
) -> dict[str, Any]:
    """Statistics of preference pairs.

    Args:
        documents: the encoded pairs.
        kept: indices of the pairs that are kept, shape (pairs,).
        dropped: number of dropped rows by reason.
        rows: number of rows read.

    Returns:
        `pairs`; `chosen_tokens` and `rejected_tokens` (means); `chosen_longer` and `equal_length` (shares);
        `length_predicts`: accuracy of the better of the two rules "longer" and "shorter", where ties count half;
        `length_ratio`: of the mean lengths, the larger by the smaller; `conflicting`, `language_mismatch` (shares of
        pairs, each with `…_examples`); `same_answers`, `too_long` (shares of rows read).
    """
    sizes = np.diff(documents.offsets).reshape(-1, 3)[kept]
    chosen, rejected = sizes[:, 1], sizes[:, 2]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    accuracy = longer + equal / 2
    means = float(chosen.mean()), float(rejected.mean())
    chosen_hashes, rejected_hashes = documents.identities[kept, 2], documents.identities[kept, 3]
    conflicts = np.flatnonzero(np.isin(chosen_hashes, rejected_hashes) | np.isin(rejected_hashes, chosen_hashes))
    mismatches = np.flatnonzero(documents.mismatched[kept])
    return {
        "pairs": len(kept),
        "chosen_tokens": round(means[0], 1),
        "rejected_tokens": round(means[1], 1),
        "chosen_longer": round(longer, 4),
        "equal_length": round(equal, 4),
        "length_predicts": round(max(accuracy, 1 - accuracy), 4),
        "length_ratio": round(max(means) / max(min(means), 1e-9), 4),
        "conflicting": round(len(conflicts) / len(kept), 4),
        "conflicting_examples": [documents.location(kept[i]) for i in conflicts[:_MAX_EXAMPLES]],
        "language_mismatch": round(len(mismatches) / len(kept), 4),
        "language_mismatch_examples": [documents.location(kept[i]) for i in mismatches[:_MAX_EXAMPLES]],
        "same_answers": round(dropped.get("chosen_equals_rejected", 0) / max(1, rows), 4),
        "too_long": round(dropped.get("too_long", 0) / max(1, rows), 4),
    }


def check_preferences(statistics: Mapping[str, Any], limits: PreferenceSection) -> list[str]:
    """The warnings about preference data: statistics at or above the `warn` limit of the recipe.

    Raises:
        DataError: with all statistics at or above their `fail` limit.
    """
    warnings: list[str] = []
    failures: list[Problem] = []
    for name, (description, remedy) in PREFERENCE_WARNINGS.items():
        limit: Limit = getattr(limits, name)
        value = statistics[name]
        side = "longer" if statistics["chosen_longer"] + statistics["equal_length"] / 2 >= 0.5 else "shorter"
        text = description.format(value=value, side=f"the {side} is chosen")
        if limit.fail is not None and value >= limit.fail:
            failures.append(Problem("data.preferences", f"{text}; {name} fails from {limit.fail:g}", remedy))
        elif limit.warn is not None and value >= limit.warn:
            warnings.append(f"{text}: {remedy}")
    if failures:
        raise DataError(failures)
    return warnings
