"""What looks like a secret: it belongs into the environment, not into a file that is recorded, shared and published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]

# Tokens that say by their form whose they are.
KINDS = {
    "of the Hugging Face hub": r"\bhf_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{20,}",  # not `hf_some_words`
    "of an API": r"(?<![\w/-])sk-(?:[a-z0-9]+-){0,2}(?=\w*[A-Z0-9])\w{16,}",  # not `sk-some-words`
    "of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "in a URL": r"\b\w+://[^/\s:@]+:[^/\s:@]+@",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
WORDS = frozenset({"TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "KEY", "APIKEY", "CREDENTIAL",
                   "CREDENTIALS"})  # fmt: skip


def kind_of(text: str) -> str | None:
    """Whose secret a text holds, or None."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, text)), None)


def masked(text: str) -> str:
    """A text without the secrets in it."""
    for pattern in KINDS.values():
        text = re.sub(pattern, "…", text)
    return text


def names_a_secret(variable: str) -> bool:
    """Whether an environment variable's name says that it holds a secret: `HF_TOKEN`, not `TOKENIZERS_PARALLELISM`."""
    return not WORDS.isdisjoint(variable.upper().split("_"))


def find_secrets(raw: Any, here: Path = ()) -> Iterator[tuple[Path, str]]:
    """Where texts of nested data, keys among them, hold a secret, and whose."""
    if isinstance(raw, str) and (kind := kind_of(raw)):
        yield here, kind
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            if isinstance(key, str) and (kind := kind_of(key)):
                yield here, kind
            yield from find_secrets(value, (*here, key))
    elif isinstance(raw, (list, tuple)):
        for i, value in enumerate(raw):
            yield from find_secrets(value, (*here, i))
