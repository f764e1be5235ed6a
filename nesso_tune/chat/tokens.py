"""Editing a tokenizer's files so that the template's control tokens are single tokens.

Works on `tokenizer.json` as data: a reserved slot is renamed (its id and the size of the vocabulary stay), or a new
token is appended.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from nesso_tune.errors import ModelError

NewTokens = Literal["auto", "reserved", "resize"]
NO_LEADING_SPACE: dict[str, dict[str, Any]] = {
    "Metaspace": {"add_prefix_space": False, "prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"start": 0},
}
RESERVED = re.compile(r"^<?[<\[|]*(?:reserved|unused|extra)[a-z_]*?[_-]?(\d+)[|\]>]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Placed:
    """Where control tokens went: those renamed over reserved slots and those appended, as {token: id}."""

    renamed: dict[str, int]
    added: dict[str, int]


def place_control_tokens(tokenizer: dict[str, Any], wanted: list[str], how: NewTokens, where: str) -> Placed:
    """Makes every wanted token a special token of `tokenizer` (the content of tokenizer.json, changed in place).

    Raises:
        ModelError: if `how` is `reserved` and there are too few slots.
    """
    known = {entry["content"]: entry for entry in tokenizer["added_tokens"]}
    for token in wanted:
        if token in known:
            known[token].update(_special(known[token]["id"], token))  # some swallow the blanks around them
    in_vocabulary = _vocabulary(tokenizer)
    missing = [token for token in wanted if token not in known]
    renamed, added = {}, {}
    slots = _reserved_slots(tokenizer)
    absent = [token for token in missing if token not in in_vocabulary]
    if how == "reserved" and len(slots) < len(absent):
        raise ModelError(
            where, f"the tokenizer has {len(slots)} reserved slots, the template needs {len(absent)}",
            "set chat.new_tokens: resize",
        )  # fmt: skip
    use_slots = how == "reserved" or (how == "auto" and len(slots) >= len(absent))
    for token in missing:
        if token in in_vocabulary:  # a plain word of the vocabulary becomes a special token where it stands
            tokenizer["added_tokens"].append(_special(in_vocabulary[token], token))
        elif use_slots:
            renamed[token] = _rename(tokenizer, slots.pop(0), token)
        else:
            added[token] = _append(tokenizer, token)
    tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])
    return Placed(renamed, added)


def emit_nothing_around(tokenizer: dict[str, Any]) -> None:
    """Removes what the tokenizer adds around every text (BOS, EOS, a leading space) and its own truncation.

    The template alone decides what is emitted, and a text has the same ids wherever it stands in a conversation.
    """
    tokenizer["truncation"] = tokenizer["padding"] = None
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        tokenizer[part] = _without_leading_space(tokenizer.get(part))
    processor = tokenizer.get("post_processor")
    steps = processor.get("processors", []) if processor and processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step and step["type"] == "ByteLevel"]
    tokenizer["post_processor"] = kept[0] if kept else None


def _without_leading_space(part: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder that neither puts a space before a text nor takes it away."""
    if not part or part["type"] == "Prepend":
        return None
    part = {**part, **{key: off for key, off in NO_LEADING_SPACE.get(part["type"], {}).items() if key in part}}
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            part[key] = [kept for inner in part[key] if (kept := _without_leading_space(inner))]
    return part


def size_of(tokenizer: dict[str, Any]) -> int:
    """Number of ids: one more than the highest."""
    ids = [entry["id"] for entry in tokenizer["added_tokens"]]
    return max([*_vocabulary(tokenizer).values(), *ids], default=-1) + 1


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: i for i, (token, _) in enumerate(vocabulary)}  # Unigram: a list of [token, score]


def _reserved_slots(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    found = [(m, e) for e in tokenizer["added_tokens"] if (m := RESERVED.match(e["content"]))]
    return [entry for match, entry in sorted(found, key=lambda pair: int(pair[0].group(1)))]


def _rename(tokenizer: dict[str, Any], slot: dict[str, Any], token: str) -> int:
    old, position = slot["content"], int(slot["id"])
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[token] = vocabulary.pop(old)
    elif isinstance(vocabulary, list) and position < len(vocabulary) and vocabulary[position][0] == old:
        vocabulary[position] = [token, vocabulary[position][1]]
    slot.update(_special(position, token))
    return position


def _append(tokenizer: dict[str, Any], token: str) -> int:
    position = size_of(tokenizer)
    tokenizer["added_tokens"].append(_special(position, token))
    return position


def _special(position: int, token: str) -> dict[str, Any]:
    return {
        "id": position, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
