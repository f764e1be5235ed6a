"""Checks of verifiable instructions (IFEval: Zhou et al., 2023, arXiv:2311.07911) for Italian and English texts.

Instruction ids and arguments are those of IFEval. For English texts the verdicts are those of lm-eval, except that
languages are detected by the detector of nesso-tune. For Italian texts:

- Unicode is normalised (NFC) and typographic apostrophes are read as `'`, so `è` and `e` + accent are equal.
- Sentences are those of Punkt's Italian model. Words are sequences of letters and digits: `l'acqua` has two.
- A letter without an accent is counted with its accented forms: `città` has one `a`.
- Words in capitals have at least two letters: `È` at the start of a sentence is none.
- The first word of a paragraph may be an elision: `L'Italia` starts with `l'`, with `l` and with `l'italia`.
- Quotation marks are `"…"`, `“…”` or `«…»`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nesso_tune.conversation import UNKNOWN_LANGUAGE
from nesso_tune.evaluation.punkt import count_sentences
from nesso_tune.generation.answers import detected_language

WORD = re.compile(r"\w+")
RELATIONS = {"less than": lambda a, b: a < b, "at least": lambda a, b: a >= b}
RELATION_NAMES = {"meno di": "less than", "almeno": "at least"}
CONSTRAINED_ANSWERS = {
    "it": ("La mia risposta è sì.", "La mia risposta è no.", "La mia risposta è forse."),
    "en": ("My answer is yes.", "My answer is no.", "My answer is maybe."),
}
QUOTES = {"it": (('"', '"'), ("“", "”"), ("«", "»")), "en": (('"', '"'),)}
PUNKT = {"it": "italian", "en": "english"}


@dataclass(frozen=True)
class Text:
    """An answer, and the language whose rules apply."""

    value: str
    language: str

    @property
    def italian(self) -> bool:
        """Whether the rules for Italian apply."""
        return self.language == "it"


Arguments = Mapping[str, Any]
Check = Callable[[Text, Arguments], bool]


def is_followed(instruction: str, arguments: Arguments, answer: str, language: str) -> bool:
    """Whether an answer follows one instruction; an empty answer follows none.

    Args:
        instruction: id, e.g. `length_constraints:number_words`. A prefix `it:` is ignored.
        arguments: of the instruction; None values are ignored.
        answer: the answer.
        language: `it` or `en`.

    Raises:
        KeyError: for an unknown instruction, or a missing argument.
        ValueError: for an unknown relation.
    """
    given = {key: _normal(value, language) for key, value in arguments.items() if value is not None}
    if not answer.strip():
        return False
    return CHECKS[instruction.removeprefix("it:")](Text(_normal(answer, language), language), given)


def is_followed_loosely(instruction: str, arguments: Arguments, answer: str, language: str) -> bool:
    """Whether any of eight variants follows: without the first line, the last line, both, and without asterisks."""
    lines = answer.split("\n")
    variants = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants += [variant.replace("*", "") for variant in variants]
    return any(is_followed(instruction, arguments, variant, language) for variant in variants)


def _normal(value: Any, language: str) -> Any:
    """Text in NFC, for Italian with typewriter apostrophes; lists of texts likewise; other values unchanged."""
    if isinstance(value, list):
        return [_normal(item, language) for item in value]
    if not isinstance(value, str) or language != "it":
        return value
    return unicodedata.normalize("NFC", value).replace("’", "'").replace("ʼ", "'")


def _related(count: int, arguments: Arguments, limit: str, relation: str = "relation") -> bool:
    name = str(arguments[relation])
    name = RELATION_NAMES.get(name, name)
    if name not in RELATIONS:
        raise ValueError(f"unknown relation `{name}`; use {' or '.join(RELATIONS)}")
    return RELATIONS[name](count, int(arguments[limit]))


# Keywords


def _keywords(text: Text, arguments: Arguments) -> bool:
    return all(re.search(re.escape(word), text.value, re.IGNORECASE) for word in arguments["keywords"])


def _keyword_frequency(text: Text, arguments: Arguments) -> bool:
    found = re.findall(re.escape(arguments["keyword"].strip()), text.value, re.IGNORECASE)
    return _related(len(found), arguments, "frequency")


def _no_forbidden_words(text: Text, arguments: Arguments) -> bool:
    words = arguments["forbidden_words"]
    return not any(re.search(rf"\b{re.escape(word)}\b", text.value, re.IGNORECASE) for word in words)


def _letter_frequency(text: Text, arguments: Arguments) -> bool:
    letter, value = arguments["letter"].strip().lower(), text.value.lower()
    if text.italian and letter.isascii():
        value = unicodedata.normalize("NFD", value)  # an accent becomes a character of its own
    return _related(value.count(letter), arguments, "let_frequency", "let_relation")


# Length


def _words(text: Text, arguments: Arguments) -> bool:
    return _related(len(WORD.findall(text.value)), arguments, "num_words")


def _sentences(text: Text, arguments: Arguments) -> bool:
    return _related(count_sentences(text.value, PUNKT[text.language]), arguments, "num_sentences")


def _paragraphs(text: Text, arguments: Arguments) -> bool:
    """Exactly this many paragraphs, separated by `***`; only the first and the last part may be empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text.value)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == int(arguments["num_paragraphs"])


def _nth_paragraph_first_word(text: Text, arguments: Arguments) -> bool:
    """Exactly this many paragraphs, separated by an empty line, of which the n-th starts with a word."""
    parts = text.value.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), int(arguments["nth_paragraph"])
    if count != int(arguments["num_paragraphs"]) or nth > count or not parts[nth - 1].strip():
        return False
    first = parts[nth - 1].split()[0].lstrip("'").lstrip('"').lower()
    word = re.split(r"[.,?!'\"]", first)[0]
    wanted = arguments["first_word"].lower()
    if not text.italian:
        return bool(word == wanted)
    first = first.lstrip("«“\"'*_#").rstrip('.,;:?!»”"*_')
    elided = first[: first.index("'") + 1] if "'" in first else first
    return wanted in (first, elided, elided.rstrip("'"))


# Content and format


def _placeholders(text: Text, arguments: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text.value)) >= int(arguments["num_placeholders"])


def _postscript(text: Text, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s.*$", "P.S.": r"p\.\s?s\..*$"}
    if text.italian:  # the full stops are often left out, but then a mark follows: "passo" has no postscript
        patterns = {"P.P.S": r"^\s*p\.?\s?p\.?\s?s\b.*$", "P.S.": r"^\s*p\.?\s?s\b.*$"}
    name = "P.P.S" if marker == "P.P.S." and text.italian else marker
    pattern = patterns.get(name, re.escape(marker.lower()) + r".*$")
    return re.search(pattern, text.value.lower(), re.MULTILINE) is not None


def _bullets(text: Text, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text.value, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text.value, re.MULTILINE)
    return len(stars) + len(dashes) == int(arguments["num_bullets"])


def _constrained(text: Text, arguments: Arguments) -> bool:
    return any(option in text.value for option in CONSTRAINED_ANSWERS[text.language])


def _highlights(text: Text, arguments: Arguments) -> bool:
    found = [span.strip("*") for span in re.findall(r"\*[^\n\*]*\*", text.value)]
    found += [span.removeprefix("**").removesuffix("**") for span in re.findall(r"\*\*[^\n\*]*\*\*", text.value)]
    return sum(bool(span.strip()) for span in found) >= int(arguments["num_highlights"])


def _sections(text: Text, arguments: Arguments) -> bool:
    marker = re.escape(arguments["section_spliter"].strip())
    return len(re.findall(rf"\s?{marker}\s?\d+\s?", text.value)) >= int(arguments["num_sections"])


def _json(text: Text, arguments: Arguments) -> bool:
    value = text.value.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        value = value.removeprefix(fence)
    try:
        json.loads(value.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: Text, arguments: Arguments) -> bool:
    titles = re.findall(r"<<[^\n]+>>", text.value)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _two_responses(text: Text, arguments: Arguments) -> bool:
    """Two different answers, separated by six asterisks; only the first and the last part may be empty."""
    parts = [part.strip() for part in text.value.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeated_prompt(text: Text, arguments: Arguments) -> bool:
    return text.value.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _end(text: Text, arguments: Arguments) -> bool:
    return text.value.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _quoted(text: Text, arguments: Arguments) -> bool:
    value = text.value.strip()
    return len(value) > 1 and any(value[0] == start and value[-1] == end for start, end in QUOTES[text.language])


def _no_commas(text: Text, arguments: Arguments) -> bool:
    return "," not in text.value


# Case and language


def _capital_words(text: Text, arguments: Arguments) -> bool:
    if text.italian:
        count = sum(word.isupper() and sum(map(str.isalpha, word)) > 1 for word in WORD.findall(text.value))
    else:
        from nltk import word_tokenize

        count_sentences("", "english")  # word_tokenize needs the English model
        count = sum(word.isupper() for word in word_tokenize(text.value))
    return _related(count, arguments, "capital_frequency", "capital_relation")


def _in_language(text: Text, code: str) -> bool:
    """Whether the text is in a language; a text too short to tell is, as in IFEval."""
    return detected_language(text.value.lower()) in (code, UNKNOWN_LANGUAGE)


def _response_language(text: Text, arguments: Arguments) -> bool:
    return _in_language(text, arguments["language"])


def _capitals(code: str) -> Check:
    return lambda text, arguments: text.value.isupper() and _in_language(text, code)


def _lowercase(code: str) -> Check:
    return lambda text, arguments: text.value.islower() and _in_language(text, code)


CHECKS: Mapping[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _no_forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeated_prompt,
    "startend:end_checker": _end,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capitals("en"),
    "change_case:english_lowercase": _lowercase("en"),
    "change_case:italian_capital": _capitals("it"),
    "change_case:italian_lowercase": _lowercase("it"),
    "punctuation:no_comma": _no_commas,
}
