"""Language identification with py3langid: a small offline model over byte n-grams (Lui and Baldwin, 2012)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, PreferencePair
from nesso_tune.data.convert import Example

# Small languages close to these (Ligurian, Venetian, …) are left out: most detections of them would be wrong
CANDIDATE_LANGUAGES = (
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hr", "hu", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sk", "sl", "sq", "sr", "sv", "tr", "uk", "zh", "zxx",
)  # fmt: skip
NO_LANGUAGE = "zxx"  # ISO 639 code of numbers, markup and code
_MIN_CONFIDENCE = 0.2
_MAX_CHARACTERS = 1000  # of a text that the model reads
_MIN_COMPARED_CHARACTERS = 40  # length from which the languages of two texts are compared


def detect_language(text: str) -> str:
    """ISO 639-1 code of the language of a text; `und` if the text is too short to tell, or not in any language."""
    code, confidence = _model().classify(text[:_MAX_CHARACTERS])
    return UNKNOWN_LANGUAGE if confidence < _MIN_CONFIDENCE or code == NO_LANGUAGE else str(code)


def detect_example_language(example: Example) -> str:
    """The language of an example: that of its user and assistant turns, without a rejected answer."""
    turns = (*example.prompt, example.chosen) if isinstance(example, PreferencePair) else example.turns
    return detect_language(" ".join(turn.content for turn in turns if turn.role in ("user", "assistant")))


def has_language_mismatch(pair: PreferencePair) -> bool:
    """Whether an answer is in another language than the last user turn. Short texts and unknown languages match."""
    question = next((turn.content for turn in reversed(pair.prompt) if turn.role == "user"), "")
    texts = (question, pair.chosen.content, pair.rejected.content)
    texts_to_compare = [text for text in texts if len(text) >= _MIN_COMPARED_CHARACTERS]
    if len(question) < _MIN_COMPARED_CHARACTERS or len(texts_to_compare) < 2:
        return False
    expected, *answers = (detect_language(text) for text in texts_to_compare)
    return expected != UNKNOWN_LANGUAGE and any(code not in (expected, UNKNOWN_LANGUAGE) for code in answers)


def load_language_model() -> None:
    """Loads the model, so that processes forked later share its memory."""
    _model()


@lru_cache(maxsize=1)
def _model() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(CANDIDATE_LANGUAGES))
    return identifier
