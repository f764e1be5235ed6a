"""Oddities of rows that are kept: what a person would want to know of, and often to look at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from nesso_tune.chat.render import function_of
from nesso_tune.conversation import Conversation
from nesso_tune.data.convert import Example, is_empty
from nesso_tune.data.token_store import Documents, Ints
from nesso_tune.errors import DataError, Problem
from nesso_tune.recipes.sections import Limit, PreferenceSection

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{2,6}|#x[0-9a-fA-F]{2,6});")
MOJIBAKE = re.compile("Ã[\x80-\xbf]|â€|Â[\xa0-\xbf]")  # UTF-8 that was read as Latin-1 or Windows-1252
PLACEHOLDER = re.compile(r"\{\{.*?\}\}")
STAND_IN = re.compile(r"\s*__[A-Z_]+__\s*")

# What is looked for in the text of a row, by the name it is reported under. The cheap question comes first.
IN_TEXT: dict[str, Callable[[str], bool]] = {
    "no_break_space": lambda text: "\xa0" in text,
    "zero_width_character": lambda text: not text.isascii() and any(c in text for c in ZERO_WIDTH),
    "control_character": lambda text: CONTROL.search(text) is not None,
    "html_entity": lambda text: "&" in text and ENTITY.search(text) is not None,
    "mojibake": lambda text: not text.isascii() and MOJIBAKE.search(text) is not None,
    "template_placeholder": lambda text: "{{" in text and PLACEHOLDER.search(text) is not None,
}


def find_anomalies(item: Example, control_tokens: Collection[str]) -> list[str]:
    """The oddities of an item by name.

    Args:
        item: the conversation, text or pair.
        control_tokens: of the template; where a text spells one, it is read as plain text.
    """
    text = "\n".join(turn.content for turn in item.turns)
    found = [name for name, is_in in IN_TEXT.items() if is_in(text)]
    if any(token in text for token in control_tokens):
        found.append("control_token_as_text")
    if "__" in text and any(STAND_IN.fullmatch(turn.content) for turn in item.turns):
        found.append("stand_in_turn")
    if item.tools and _calls_another(item):
        found.append("call_of_a_tool_not_offered")
    if isinstance(item, Conversation):
        first = next((turn.role for turn in item.messages if turn.role != "system"), "")
        if first == "assistant":
            found.append("opens_with_assistant")
        if item.messages[-1].role != "assistant":
            found.append("ends_without_answer")
        if any(is_empty(turn) and turn.role in ("user", "system") for turn in item.messages):
            found.append("empty_turn")
    return found


def _calls_another(item: Example) -> bool:
    """Whether a tool is called that is not on offer."""
    offered = {function_of(tool)["function"]["name"] for tool in item.tools}
    return any(call["name"] not in offered for turn in item.turns for call in turn.tool_calls)


QUANTILES = {"min": 0.0, "p50": 0.5, "p95": 0.95, "max": 1.0}


def length_histograms(documents: Documents, entries: Ints) -> dict[str, Any]:
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


PREFERENCE_WARNINGS = {  # of each figure: what it means, and what can be done
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


def preference_statistics(documents: Documents, kept: Ints, dropped: Mapping[str, int], rows: int) -> dict[str, Any]:
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
    for name, (what, remedy) in PREFERENCE_WARNINGS.items():
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
