"""Personal data in texts, tool calls and tools: Italian and international kinds, found by checksum or numbering plan.

Precision comes first, since many rows hold code, mathematics or identifiers: a number counts only if its check digits
are right, and where one number in ten would pass by chance, only beside a word that says what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from nesso_tune.conversation import Completion, Conversation, Message, PreferencePair
from nesso_tune.data.columns import Unusable
from nesso_tune.data.convert import Example

_CONTEXT_CHARACTERS = 40  # on each side of an example
_MIN_IDENTIFIER = 10**9  # a smaller integer in the arguments of a call is no identifier
_BEFORE = 60  # characters before a number in which a label is looked for; it ends at most 20 before the number
_LETTER_VALUE = {letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 10)}

# Patterns are texts: `re` compiles them when they are first used, which most recipes never do.

# E-mail addresses. Names that RFC 2606 reserves for examples belong to nobody; the others are names of files.
_EMAIL = (
    r"(?<![\w.%+-])\w[\w.%+-]{0,63}@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,12}))(?![\w@([-])"
)
_RESERVED_DOMAIN = r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost)$"
_GENERIC_DOMAINS = (
    "com org net edu gov mil int info biz name pro aero coop museum jobs mobi travel tel cat asia arpa post app dev "
    "online site store shop tech cloud email club xyz blog live digital agency studio world today news media group "
    "team work company consulting services solutions systems network space website design academy health care legal "
    "law bank finance capital energy school foundation social global international center zone life top"
)
_TOP_DOMAINS = frozenset(_GENERIC_DOMAINS.split())  # and all of two letters

# Codice fiscale (DM 23/12/1976): digits may be replaced by the letters LMNPQRSTUV if two people had the same code.
_CODICE_FISCALE = r"(?i:\b([A-Z]{3} ?[A-Z]{3} ?[\dLMNP-V]{2}[ABCDEHLMPRST][\dLMNP-V]{2} ?[A-MZ][\dLMNP-V]{3} ?[A-Z])\b)"
_CANDIDATE = rf"@|\d(?:[ ./()-]{{0,2}}\d){{5}}|{_CODICE_FISCALE}"  # in every text with personal data
_OMOCODIA = str.maketrans("LMNPQRSTUV", "0123456789")
_ODD_VALUES = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)

# IBAN (ISO 13616): length by country, as in the registry of SWIFT.
_IBAN_START = r"\b([A-Za-z]{2})\d{2}(?= ?[A-Za-z0-9])"
_IBAN_COUNTRIES = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
    "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
    "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
    "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
    "YE30"
)
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _IBAN_COUNTRIES.split()}

# Payment cards: the ranges of the large schemes, with their lengths, in one group or as they are printed.
_CARD = (
    r"(?<![\w.,+-])(?:\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})(?![\w-]|[.,]\d)"
)
_CARD_RANGE = (
    r"4\d{15}|5[1-5]\d{14}|(?:222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{12}"
)

# Partita IVA (DPR 633/1972): one number of eleven digits in ten has the right check digit, so a label must be near.
_ELEVEN_DIGITS = r"(?<![\w.,+-])([Ii][Tt] ?)?(\d{11})(?!\w|[.,-]\d)"
_OFFICES = frozenset([*range(1, 101), 120, 121, 888, 999])
_TAX_LABEL = r"(?i)(?:\bp(?:art(?:ita)?)?\.?\s?_?iva|\bvat|\btax|\bc\.?\s?f\.|\bcf\b|\bcodice[\s_]fiscale)\D{0,20}$"

# Phone numbers: with `+` or 0039, or Italian ones beside a label or as mobile numbers are written.
_PHONE = r"(?<![\w.,/=*^-])(?:\+|(?=0|3|\(0))\(?\d(?:[ ./()-]{0,2}\d){5,16}(?![\w%€$°]|[.,:/=*^+-]\d)"
_PHONE_LABEL = (
    r"(?i)\b(?:tel|telefon\w*|cell|cellulare|mobile|phone|phone[\s_]number|fax|whatsapp|chiama\w*|call)\b\D{0,20}$"
)
_MOBILE = r"3\d\d(?:[ /-]\d{6,7}|[ /-]\d{3}[ .-]\d{3,4}|\.\d{3}\.\d{3,4}|([ .-])\d\d\1\d\d\1\d{2,3})"
_NUMBER_BEFORE, _NUMBER_AFTER = r"\d[\s,;:+*/=-]*$", r"[\s,;:+*/=-]*\d"


class Finding(NamedTuple):
    """A place in a text, from `start` to `end`, and the kind of personal data that is there."""

    kind: str
    start: int
    end: int


def find_personal_data(text: str, label: str = "") -> list[Finding]:
    """The personal data in a text, in order and without overlaps.

    Args:
        text: any text.
        label: words that precede the text, such as the name of an argument; they may say what a number is.
    """
    if not re.search(_CANDIDATE, text):
        return []
    found: list[Finding] = []
    before = f"{label}: " if label else ""
    for kind, spans in _FINDERS.items():
        for start, end in spans(before + text):
            start, end = start - len(before), end - len(before)
            if start >= 0 and all(end <= other.start or start >= other.end for other in found):
                found.append(Finding(kind, start, end))
    return sorted(found, key=lambda finding: finding.start)


def mask_personal_data(text: str, label: str = "") -> str:
    """The text with a placeholder such as `[EMAIL]` or `[IBAN]` for each value; nothing more is found in the result."""
    while found := find_personal_data(text, label):  # a label may be nearer to a number once a value between is masked
        for kind, start, end in reversed(found):
            text = f"{text[:start]}[{kind.upper()}]{text[end:]}"
    return text


@dataclass
class PersonalDataSearch:
    """Searches the texts of one example: contents, tool calls and tools.

    Attributes:
        mask: whether the example that `example` returns has placeholders for the values.
        values: number of values by kind.
        contexts: the first value of each kind as a placeholder, with the masked text around it.
    """

    mask: bool = False
    values: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, str] = field(default_factory=dict)

    def example(self, example: Example) -> Example:
        """Searches an example and returns it, masked if asked for. Token ids have no text to search.

        Raises:
            Unusable: if two keys of an object become equal when they are masked.
        """
        if isinstance(example, Completion):
            return replace(example, text=self._text(example.text))
        if isinstance(example, Conversation):
            messages = tuple(map(self._message, example.messages))
            return replace(example, messages=messages, tools=self._value(example.tools))
        if isinstance(example, PreferencePair):
            prompt, (chosen, rejected) = map(self._message, example.prompt), map(self._message, example.turns[-2:])
            tools = self._value(example.tools)
            return replace(example, prompt=tuple(prompt), chosen=chosen, rejected=rejected, tools=tools)
        return example

    def _message(self, message: Message) -> Message:
        content = self._text(message.content)
        if not message.tool_calls:
            return message if content is message.content else replace(message, content=content)
        return replace(message, content=content, tool_calls=self._value(message.tool_calls))

    def _value(self, value: Any, label: str = "") -> Any:
        """A JSON value of a call or tool, of the same type unless it is a number that is masked."""
        if isinstance(value, str):
            return self._text(value, label)
        if isinstance(value, Mapping):
            masked = {self._text(str(key)): self._value(item, str(key)) for key, item in value.items()}
            if len(masked) < len(value):
                raise Unusable("personal_data", "two keys become equal when they are masked")
            return masked if self.mask else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(item, label) for item in value)
        if isinstance(value, int) and abs(value) >= _MIN_IDENTIFIER:
            text = self._text(str(value), label)
            return value if text == str(value) else text
        return value

    def _text(self, text: str, label: str = "") -> str:
        if not (found := find_personal_data(text, label)):
            return text
        masked = mask_personal_data(text, label)
        for kind, _, _ in found:
            self.values[kind] = self.values.get(kind, 0) + 1
            self.contexts.setdefault(kind, _excerpt(masked, f"[{kind.upper()}]"))
        return masked if self.mask else text


def _excerpt(masked: str, placeholder: str) -> str:
    """A placeholder with the text around it, on one line."""
    start = masked.index(placeholder)
    end = start + len(placeholder) + _CONTEXT_CHARACTERS
    before = max(0, start - _CONTEXT_CHARACTERS)
    text = " ".join(masked[before:end].split())
    return f"{'…' if before else ''}{text}{'…' if end < len(masked) else ''}"


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(_EMAIL, text) if "@" in text else ():
        domain, top = match[1].lower(), match[2].lower()
        if (len(top) == 2 or top in _TOP_DOMAINS) and not re.search(_RESERVED_DOMAIN, domain):
            yield match.span()


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(_IBAN_START, text):
        length = _IBAN_LENGTHS.get(match[1].upper())
        if length is None:
            continue
        rest = re.match(
            rf"(?: ?[A-Za-z0-9]){{{length - 4}}}(?![A-Za-z0-9])", text[match.end() : match.end() + 2 * length]
        )
        if rest is not None and is_iban(match[0] + rest[0]):
            yield match.start(), match.end() + rest.end()


def _codici_fiscali(text: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(_CODICE_FISCALE, text):
        # Without any digit, only as it is printed: words are not
        if is_codice_fiscale(match[1]) and (re.search(r"\d", match[1]) or (match[1].isupper() and " " not in match[1])):
            yield match.span()


def _card_numbers(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in re.finditer(_CARD, text) if is_card_number(match[0]))


def _partite_iva(text: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(_ELEVEN_DIGITS, text):
        start = match.start()
        if is_partita_iva(match[2]) and (match[1] or re.search(_TAX_LABEL, text[max(0, start - _BEFORE) : start])):
            yield match.span(2)


def _phone_numbers(text: str) -> Iterator[tuple[int, int]]:
    for match in re.finditer(_PHONE, text):
        written, (start, end) = match[0], match.span()
        before = text[max(0, start - _BEFORE) : start]
        follows_number = re.search(_NUMBER_BEFORE, before) is not None
        if written.startswith(("+", "0039")):
            accepted = not follows_number and _is_phone_number(f"+{written.lstrip('+0')}")
        elif re.search(_PHONE_LABEL, before):
            accepted = _is_phone_number(written)
        else:
            alone = not follows_number and not re.match(_NUMBER_AFTER, text[end : end + 10])
            accepted = alone and re.fullmatch(_MOBILE, written) is not None and _is_phone_number(written)
        if accepted:
            yield start, end


_FINDERS: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {  # the first that claims a place has it
    "email": _emails,
    "iban": _ibans,
    "codice_fiscale": _codici_fiscali,
    "card_number": _card_numbers,
    "partita_iva": _partite_iva,
    "phone_number": _phone_numbers,
}
KINDS = tuple(_FINDERS)


def is_iban(text: str) -> bool:
    """Whether an IBAN has its country's length, check digits from 02 to 98 and a remainder of 1 modulo 97 (ISO 13616,
    ISO 7064); spaces do not count.
    """
    code = text.replace(" ", "").upper()
    if _IBAN_LENGTHS.get(code[:2]) != len(code) or not "02" <= code[2:4] <= "98":
        return False
    return int("".join(str(_LETTER_VALUE.get(c, c)) for c in code[4:] + code[:4])) % 97 == 1


def is_codice_fiscale(text: str) -> bool:
    """Whether a codice fiscale has a possible day and its check character; spaces do not count."""
    code = text.replace(" ", "").upper()
    day = int(code[9:11].translate(_OMOCODIA))
    return (1 <= day <= 31 or 41 <= day <= 71) and code[15] == codice_fiscale_check(code[:15])


def codice_fiscale_check(code: str) -> str:
    """The check character of the first 15 characters: their values by odd and even position, modulo 26."""
    values = [int(c) if c.isdigit() else ord(c) - ord("A") for c in code]
    total = sum(_ODD_VALUES[value] for value in values[::2]) + sum(values[1::2])
    return chr(ord("A") + total % 26)


def is_partita_iva(digits: str) -> bool:
    """Whether eleven digits have the code of an office (8th to 10th digit) and the check digit (Luhn)."""
    return int(digits[:7]) > 0 and int(digits[7:10]) in _OFFICES and _passes_luhn(digits)


def is_card_number(text: str) -> bool:
    """Whether a number is in the range of a card scheme and passes the Luhn check (ISO/IEC 7812)."""
    digits = re.sub("[ -]", "", text)
    return re.fullmatch(_CARD_RANGE, digits) is not None and _passes_luhn(digits)


def _passes_luhn(digits: str) -> bool:
    doubled = (2 * int(digit) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(n - 9 if n > 9 else n for n in doubled)) % 10 == 0


def _is_phone_number(text: str) -> bool:
    """Whether a number is assigned in the numbering plan of its country; of Italy, without a country code."""
    import phonenumbers

    try:
        return bool(phonenumbers.is_valid_number(phonenumbers.parse(text, "IT")))
    except phonenumbers.NumberParseException:
        return False
