"""How long documents are, per language."""

from __future__ import annotations

from typing import Any

import numpy as np

from nesso_tune.data.documents import Documents, Ints

QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}


def histograms(documents: Documents, entries: Ints) -> dict[str, Any]:
    """Lengths in tokens: `edges` (powers of two), and per language `counts` between them, and quantiles.

    The length of a pair is that of its prompt and longer answer.

    An entry of length n is counted in bin i where edges[i] <= n < edges[i + 1].
    """
    lengths = documents.spans[entries]
    top = max(3, int(lengths.max(initial=1)).bit_length())
    edges = [2**i for i in range(top + 1)]
    languages = {}
    for i, name in enumerate(documents.language_names):
        own = lengths[documents.languages[entries] == i]
        if len(own):
            counts = np.histogram(own, edges)[0].tolist()
            said = {label: int(np.quantile(own, q, method="lower")) for label, q in QUANTILES.items()}
            languages[name] = {"counts": counts, "mean": round(float(own.mean()), 1), **said}
    return {"edges": edges, "languages": dict(sorted(languages.items()))}
