"""What makes two rows the same: 64-bit hashes of what is said in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple

from nesso_tune.conversation import Completion, Conversation, Message, Tokenized
from nesso_tune.data.convert import Item

NOTHING = 0


class Identity(NamedTuple):
    """Hashes of an item.

    Attributes:
        whole: of all turns and tools.
        prompt: of the turns before the last answer; of all where there is no answer.
        chosen, rejected: of the answers of a pair, with its prompt; else 0.
    """

    whole: int
    prompt: int
    chosen: int = NOTHING
    rejected: int = NOTHING


def identity_of(item: Item) -> Identity:
    """The hashes of an item. Neither its language nor its source counts."""
    if isinstance(item, Tokenized):
        key = _hash(",".join(map(str, item.input_ids)))
        return Identity(key, key)
    if isinstance(item, Completion):
        key = _hash(item.text)
        return Identity(key, key)
    tools = json.dumps(item.tools, ensure_ascii=False) if item.tools else ""
    if isinstance(item, Conversation):
        said = _said(item.messages)
        answered = next((i for i in reversed(range(len(said))) if item.messages[i].role == "assistant"), len(said))
        return Identity(_hash(tools, *said), _hash(*said[:answered]))
    prompt = _said(item.prompt)
    chosen, rejected = _said([item.chosen, item.rejected])
    return Identity(
        _hash(tools, *prompt, chosen, rejected), _hash(*prompt), _hash(*prompt, chosen), _hash(*prompt, rejected)
    )


def _said(messages: Iterable[Message]) -> list[str]:
    return [f"{m.role}\x1f{m.content}\x1f{json.dumps(m.tool_calls) if m.tool_calls else ''}" for m in messages]


def _hash(*texts: str) -> int:
    digest = hashlib.blake2b("\x1e".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
