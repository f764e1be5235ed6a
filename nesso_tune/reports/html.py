"""Texts for pages and previews: what cannot be seen is made visible, and nothing becomes markup."""

from __future__ import annotations

from html import escape


def made_visible(text: str) -> str:
    """A text in which what cannot be seen, or would move the cursor, is written as an escape; line breaks stay.

    More than `terminal.visible` does: who looks at data wants to see a no-break space too.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    """A text as markup."""
    return escape(made_visible(text))
