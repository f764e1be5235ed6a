"""Personal data: what is found and what is not, checksums, masks, and what the report says of them."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune import Conversation, DataError, Message, PreferencePair, prepare_data
from nesso_tune.conversation import Completion
from nesso_tune.data.convert import Unusable
from nesso_tune.data.personal_data import (
    KINDS,
    PersonalDataSearch,
    codice_fiscale_check,
    find_personal_data,
    is_card_number,
    is_codice_fiscale,
    is_iban,
    is_partita_iva,
    mask_personal_data,
)
from nesso_tune.data.prepare import dropped_file
from nesso_tune.reports.data_report import write_data_report
from tests.support.examples import examples

# All numbers are made for this table; none belongs to a person.
FOUND = [
    ("Scrivimi a mario.rossi@posta.it, grazie.", "email", "mario.rossi@posta.it"),
    ("<a href='mailto:info+ordini@ditta-rossi.co.uk'>", "email", "info+ordini@ditta-rossi.co.uk"),
    ("Contact: J_SMITH@MAIL.CORP.COM.", "email", "J_SMITH@MAIL.CORP.COM"),
    ("CF: RSSMRA85T10A562S", "codice_fiscale", "RSSMRA85T10A562S"),
    ("il mio codice è rssmra85t10a562s", "codice_fiscale", "rssmra85t10a562s"),
    ("RSS MRA 85T10 A562 S", "codice_fiscale", "RSS MRA 85T10 A562 S"),
    ("omocodia: RSSMRA85T10A56NH", "codice_fiscale", "RSSMRA85T10A56NH"),
    ("omocodia: RSSMRA85T10A5SNT", "codice_fiscale", "RSSMRA85T10A5SNT"),
    ("omocodia in every digit: RSSMRAURTMLARSNL", "codice_fiscale", "RSSMRAURTMLARSNL"),
    ("donna: VRDLRA90C55F205Q", "codice_fiscale", "VRDLRA90C55F205Q"),
    ("IBAN IT60X0542811101000000123456", "iban", "IT60X0542811101000000123456"),
    ("IT60 X054 2811 1010 0000 0123 456 presso la banca", "iban", "IT60 X054 2811 1010 0000 0123 456"),
    ("Konto DE89 3704 0044 0532 0130 00.", "iban", "DE89 3704 0044 0532 0130 00"),
    ("gb82west12345698765432", "iban", "gb82west12345698765432"),
    ("P.IVA 00743110157", "partita_iva", "00743110157"),
    ("partita IVA n. 07643520567", "partita_iva", "07643520567"),
    ("VAT number: IT00743110157", "partita_iva", "00743110157"),
    ("fattura a IT00743110157", "partita_iva", "00743110157"),
    ("C.F. 00743110157", "partita_iva", "00743110157"),
    ("4111 1111 1111 1111", "card_number", "4111 1111 1111 1111"),
    ("carta 5555-5555-5555-4444 scade 12/30", "card_number", "5555-5555-5555-4444"),
    ("amex 3782 822463 10005", "card_number", "3782 822463 10005"),
    ("card=6011111111111117&cvv=1", "card_number", "6011111111111117"),
    ("chiama +39 06 698 1234 5", "phone_number", "+39 06 698 1234 5"),
    ("+39 347 1234567", "phone_number", "+39 347 1234567"),
    ("+393471234567", "phone_number", "+393471234567"),
    ("0039 347 123 4567", "phone_number", "0039 347 123 4567"),
    ("+44 20 7946 0958", "phone_number", "+44 20 7946 0958"),
    ("(+1) is no number, +1 212 736 5000 is", "phone_number", "+1 212 736 5000"),
    ("cell. 3471234567", "phone_number", "3471234567"),
    ("telefono: 06 69812345", "phone_number", "06 69812345"),
    ("347 123 4567 oppure domani", "phone_number", "347 123 4567"),
    ("347-1234567", "phone_number", "347-1234567"),
]
NOT_FOUND = [
    "user@example.com, admin@shop.example.org and root@localhost",
    "me@host.invalid or a@b.test",
    "logo@2x.png, icon@3x.svg",
    "@decorator\ndef f(self): return A@B.T + W@x.mean(0)",
    "git clone git@server:project",
    "the pattern ^(.+@site.com)$",
    "RSSMRA85T10A562T",  # another check character
    "RSSMRA85T39A562O",  # no such day
    "XRSSMRA85T10A562S",
    "rssmraurtmlarsnl",  # without a digit, only in capitals
    "IT60X0542811101000000123457",  # remainder 2
    "IT60X05428111010000001234567",  # too long
    "00743110157",  # no label
    "P.IVA 00743110158",
    "P.IVA 12345678903.5",
    "the VAT is 22 percent of a price that grew over many years to 00743110157",
    "4111 1111 1111 1112",
    "4111 1111-1111 1111",  # mixed separators
    "0.4111111111111111",
    "-4111111111111111",
    "4111111111111111.5",
    "9111111111111111",
    "id: 411111111111111100000000",
    "1111111111111117",  # in no range of a scheme
    "3600000000000 + 62426244000 + 198472480000",
    "365.259636",
    "320 500 1000, 330 600 2000",
    "300 400 5000",
    "5 * 3471234567 = 17356172835",
    "3471234567",  # no label and in one piece
    "+1 555 123 4567",  # not assigned
    "2 + 393471234567",
    "0.0000001234567890123456",
    "ISBN 978-88-04-66875-8 and 192.168.100.200 and 2026-11-29 12:30:45",
    "3.14159265358979323846",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "550e8400-e29b-41d4-a716-446655440000",
]


@pytest.mark.parametrize(("text", "kind", "value"), FOUND, ids=[text[:30] for text, _, _ in FOUND])
def test_what_is_found(text, kind, value):
    assert [(kind, text[start:end]) for kind, start, end in find_personal_data(text)] == [(kind, value)]


@pytest.mark.parametrize("text", NOT_FOUND, ids=[text[:30] for text in NOT_FOUND])
def test_what_is_not(text):
    assert find_personal_data(text) == []
    assert mask_personal_data(text) is text


def test_several_in_one_text():
    text = "Rossi (a.rossi@posta.it, cell. 347 1234567), CF RSSMRA85T10A562S, IBAN IT60X0542811101000000123456"
    assert mask_personal_data(text) == "Rossi ([EMAIL], cell. [PHONE_NUMBER]), CF [CODICE_FISCALE], IBAN [IBAN]"
    assert (
        mask_personal_data("tel. a.b@posta.it e 0669812345 e 00743110157")
        == "tel. [EMAIL] e [PHONE_NUMBER] e 00743110157"
    )


@pytest.mark.parametrize("text", ["a" * 100_000, "1" * 100_000, "a.b@" * 20_000, "1 " * 50_000, "IT60" * 20_000,
                                  "+39 " * 20_000, "a@" + "b." * 50_000, "(" * 50_000 + "3"])  # fmt: skip
def test_long_texts_take_linear_time(text):
    find_personal_data(text)  # a quadratic search would take minutes


# Checksums: a valid number is found, and any other last character is not


@given(st.from_regex(r"[A-Z]{6}\d\d[ABCDEHLMPRST](0[1-9]|[12]\d|4[1-9]|[56]\d)[A-M]\d{3}", fullmatch=True), st.data())
@examples(200)
def test_codice_fiscale(code, data):
    replaced = data.draw(st.sets(st.sampled_from([6, 7, 9, 10, 12, 13, 14])))
    code = "".join("LMNPQRSTUV"[int(c)] if i in replaced else c for i, c in enumerate(code))
    check = codice_fiscale_check(code)
    assert is_codice_fiscale(code + check)
    assert mask_personal_data(f"CF {code}{check}") == "CF [CODICE_FISCALE]"
    other = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ".replace(check, "")))
    assert not is_codice_fiscale(code + other)


@given(st.from_regex(r"[A-Z][0-9]{22}", fullmatch=True), st.integers(0, 98))
@examples(200)
def test_iban(account, shift):
    digits = str(ord(account[0]) - 55) + account[1:] + "182900"
    check = 98 - int(digits) % 97
    assert is_iban(f"IT{check:02}{account}")
    others = [other for other in range(100) if other != check]
    assert not is_iban(f"IT{others[shift]:02}{account}")


@given(st.integers(1, 9_999_999), st.integers(1, 100), st.integers(1, 9))
@examples(200)
def test_partita_iva(number, office, shift):
    digits = f"{number:07}{office:03}"
    odd, even = digits[::2], digits[1::2]
    check = (10 - (sum(map(int, odd)) + sum((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)[int(d)] for d in even)) % 10) % 10
    assert is_partita_iva(f"{digits}{check}")
    assert not is_partita_iva(f"{digits}{(check + shift) % 10}")
    assert mask_personal_data(f"P. IVA: {digits}{check}") == "P. IVA: [PARTITA_IVA]"


@given(st.integers(0, 10**14 - 1), st.integers(1, 9))
@examples(200)
def test_card_number(number, shift):
    digits = f"4{number:014}"
    doubled = [d if i % 2 else 2 * d - 9 * (d > 4) for i, d in enumerate(map(int, digits))]
    check = -sum(doubled) % 10
    assert is_card_number(f"{digits}{check}")
    assert not is_card_number(f"{digits}{(check + shift) % 10}")


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from([value for _, _, value in FOUND])), max_size=6))
@examples(200)
def test_nothing_is_found_in_a_masked_text(parts):
    masked = mask_personal_data(" ".join(parts))
    assert find_personal_data(masked) == []
    assert mask_personal_data(masked) is masked


# Examples


def test_calls_tools_and_their_keys_are_searched():
    arguments = {"to": ["m.rossi@posta.it"], "telefono": "0669812345", "note": "niente", "card": 4111111111111111,
                 "n": 3, "ok": True, "a.b@posta.it": None}  # fmt: skip
    call = {"name": "send", "arguments": arguments}
    tool = {"name": "send", "description": "Sends a mail; ask help@ditta.it", "parameters": {}}
    conversation = Conversation((Message("user", "ciao"), Message("assistant", "", (call,))), (tool,))
    search = PersonalDataSearch(mask=True)
    masked = search.example(conversation)
    assert masked.messages[1].tool_calls[0]["arguments"] == {
        "to": ["[EMAIL]"], "telefono": "[PHONE_NUMBER]", "note": "niente", "card": "[CARD_NUMBER]", "n": 3, "ok": True,
        "[EMAIL]": None,
    }  # fmt: skip
    assert masked.tools[0]["description"] == "Sends a mail; ask [EMAIL]"
    assert search.values == {"email": 3, "phone_number": 1, "card_number": 1}
    unmasked = PersonalDataSearch()
    assert unmasked.example(conversation) == conversation
    assert unmasked.values == search.values


def test_two_keys_that_become_equal_drop_the_row():
    call = {"name": "send", "arguments": {"a@posta.it": 1, "b@posta.it": 2}}
    with pytest.raises(Unusable, match="personal_data"):
        PersonalDataSearch(mask=True).example(Conversation((Message("assistant", "", (call,)),)))


def test_pairs_and_texts():
    pair = PreferencePair(
        (Message("user", "x@posta.it?"),), Message("assistant", "sì: y@posta.it"), Message("assistant", "no")
    )
    masked = PersonalDataSearch(mask=True).example(pair)
    assert [turn.content for turn in masked.turns] == ["[EMAIL]?", "sì: [EMAIL]", "no"]
    assert PersonalDataSearch(mask=True).example(Completion("z@posta.it")).text == "[EMAIL]"


# Whole preparation

VALUES = ["m.rossi@posta.it", "IT60X0542811101000000123456", "347 1234567"]


@pytest.fixture
def rows(write_rows):
    texts = ["Scrivi a m.rossi@posta.it", "L'IBAN è IT60X0542811101000000123456, cell. 347 1234567", "Ciao", "Come va?"]
    return write_rows([{"prompt": text, "response": f"Va bene: {text}"} for text in texts])


def everything_written(prepared, recipe, folder):
    write_data_report(folder, recipe, prepared)
    files = [*folder.iterdir(), dropped_file(prepared)]
    return "".join(file.read_text() for file in files) + json.dumps(prepared.report)


@pytest.mark.parametrize("action", ["report", "mask", "drop"])
def test_values_are_counted_and_never_shown(action, sft, rows, tmp_path):
    recipe = sft({"path": rows}, validation_size=0, sequence_len=512, clean={"personal_data": action})
    prepared = prepare_data(recipe)
    report = prepared.report
    assert {kind: (found["rows"], found["values"]) for kind, found in report["personal_data"].items()} == {
        "email": (1, 2), "iban": (1, 2), "phone_number": (1, 2)
    }  # fmt: skip
    assert report["personal_data"]["email"]["example"].endswith(":1")
    assert report["personal_data"]["email"]["context"] == "Scrivi a [EMAIL]"
    assert report["dropped"] == ({"personal_data": 2} if action == "drop" else {})
    assert [*prepared.summary.warnings] == (
        [w for w in prepared.summary.warnings if "2 email, 2 iban, 2 phone_number" in w] if action == "report" else []
    )
    written = everything_written(prepared, recipe, tmp_path / "report")
    assert not [value for value in VALUES if value in written]
    texts = " ".join(prepared.tokenizer.decode(row["input_ids"]) for row in prepared.train)
    assert [value in texts for value in VALUES] == [action == "report"] * 3
    assert ("[IBAN], cell. [PHONE_NUMBER]" in texts) == (action == "mask")


def test_without_the_key_nothing_is_searched(sft, rows):
    assert "personal_data" not in prepare_data(sft({"path": rows}, validation_size=0, sequence_len=512)).report


def test_the_reason_of_a_dropped_row_is_masked(sft, write_rows, tmp_path):
    rows = [{"messages": [{"role": "m.rossi@posta.it", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    rows += [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    recipe = sft({"path": write_rows(rows)}, validation_size=0, clean={"personal_data": "report"})
    prepared = prepare_data(recipe)
    assert prepared.report["dropped"] == {"unknown_role": 1}
    assert "m.rossi@posta.it" not in everything_written(prepared, recipe, tmp_path / "report")


def test_a_private_source_has_counts_only(sft, rows, tmp_path):
    recipe = sft({"path": rows, "private": True}, validation_size=0, sequence_len=512, clean={"personal_data": "mask"})
    prepared = prepare_data(recipe)
    assert prepared.report["personal_data"]["email"]["context"] == ""
    write_data_report(tmp_path / "report", recipe, prepared)
    written = json.loads((tmp_path / "report" / "data_report.json").read_text())
    assert written["personal_data"]["email"] == {"rows": 1, "values": 2}


def test_validation_sources_are_searched_too(sft, rows, write_rows):
    clean = write_rows([{"prompt": "Ciao", "response": "Ciao"}], "clean.jsonl")
    recipe = sft(
        {"path": clean}, validation_sources=[{"path": rows}], sequence_len=512, clean={"personal_data": "report"}
    )
    prepared = prepare_data(recipe)
    assert prepared.report["personal_data"] == {}
    assert [w for w in prepared.summary.warnings if "validation sources: 2 email" in w]


def test_token_ids_cannot_be_searched(sft, write_rows, tmp_path):
    ids = write_rows([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    reader = tmp_path / "reader.py"
    reader.write_text("def read(row):\n    return row\n")
    with pytest.raises(DataError, match="cannot search"):
        prepare_data(sft({"path": ids, "format": f"{reader}:read"}, validation_size=0, clean={"personal_data": "mask"}))


def test_random_numbers_are_rarely_taken_for_personal_data():
    """Numbers of any length in sentences: only card numbers can pass by chance."""
    random.seed(19)
    texts = [f"The result of step {i} is {random.randrange(10 ** random.randint(6, 20))} units" for i in range(20_000)]
    found = [finding.kind for text in texts for finding in find_personal_data(text)]
    assert set(found) <= {"card_number"}
    assert len(found) <= 100


def test_kinds_have_placeholders():
    assert mask_personal_data("a@b.it") == "[EMAIL]"
    assert KINDS == ("email", "iban", "codice_fiscale", "card_number", "partita_iva", "phone_number")
