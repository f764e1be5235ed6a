"""Which language a text is in: a small offline model over character sequences (py3langid)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, PreferencePair
from nesso_tune.data.convert import Example

# The languages that are told apart. Their small neighbours (Ligurian, Venetian, …) would mostly be mistakes.
CANDIDATE_LANGUAGES = (
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hr", "hu", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sk", "sl", "sq", "sr", "sv", "tr", "uk", "zh", "zxx",
)  # fmt: skip
NO_LANGUAGE = "zxx"  # numbers, markup, code
LEAST = 0.2  # confidence below which nothing is said
ENOUGH = 1000  # characters that are looked at
TELLING = 40  # characters from which two texts are compared


def detect_language(text: str) -> str:
    """ISO 639-1 code of the language of a text; `und` where it is too short to tell, or no language at all."""
    code, confidence = _identifier().classify(text[:ENOUGH])
    return UNKNOWN_LANGUAGE if confidence < LEAST or code == NO_LANGUAGE else str(code)


def detect_example_language(item: Example) -> str:
    """The language that an item is held in: that of its users' and assistants' words together."""
    turns = (*item.prompt, item.chosen) if isinstance(item, PreferencePair) else item.turns
    return detect_language(" ".join(turn.content for turn in turns if turn.role in ("user", "assistant")))


def has_language_mismatch(pair: PreferencePair) -> bool:
    """Whether an answer of a pair is in another language than the user's last turn, as far as both are long enough."""
    asked = next((turn.content for turn in reversed(pair.prompt) if turn.role == "user"), "")
    texts = [text for text in (asked, pair.chosen.content, pair.rejected.content) if len(text) >= TELLING]
    if len(asked) < TELLING or len(texts) < 2:
        return False
    told, *answers = (detect_language(text) for text in texts)
    return told != UNKNOWN_LANGUAGE and any(code not in (told, UNKNOWN_LANGUAGE) for code in answers)


def load_language_model() -> None:
    """Reads the model, so that processes forked afterwards share it."""
    _identifier()


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(CANDIDATE_LANGUAGES))
    return identifier
