"""Reader of ChatGPT's export (`conversations.json`), for `format: recipes/readers/chatgpt.py:last_branch`.

A chat of the export is a tree of messages: an edited question or a regenerated answer begins a new branch.
"""

from __future__ import annotations

from typing import Any


def last_branch(row: dict[str, Any]) -> dict[str, Any] | None:
    """The messages of the branch that the chat ended with; None for a chat without an answer.

    Hidden messages, and turns that are not text (images, calls of ChatGPT's own tools), are left out.
    """
    nodes, key = row["mapping"], row.get("current_node")
    turns = []
    while key in nodes:
        message, key = nodes[key].get("message"), nodes[key].get("parent")
        if (turn := _turn(message)) is not None:
            turns.append(turn)
    turns.reverse()
    return {"messages": turns} if any(turn["role"] == "assistant" for turn in turns) else None


def _turn(message: dict[str, Any] | None) -> dict[str, Any] | None:
    if message is None or (message.get("metadata") or {}).get("is_visually_hidden_from_conversation"):
        return None
    role, content = message["author"]["role"], message.get("content") or {}
    parts = [part for part in content.get("parts") or [] if isinstance(part, str)]
    text = "\n".join(parts).strip()
    if role not in ("system", "user", "assistant") or content.get("content_type") != "text" or not text:
        return None
    return {"role": role, "content": text}
