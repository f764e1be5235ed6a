"""Tokens as pieces of text: every id once, whole characters, controls apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nesso_tune import Conversation, Message, load_tokenizer
from nesso_tune.chat.tokenizer import encoder_of
from nesso_tune.publish.view import Part, ViewRow, pieces_of
from nesso_tune.publish.view_html import page
from nesso_tune.publish.view_text import lines
from tests.support.examples import examples

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def encoded(tokenizer, text):
    (one,) = encoder_of(tokenizer).conversations([Conversation((Message("user", text), Message("assistant", text)))])
    return one.ids, one.trained


@examples(50)
@given(TEXT)
def test_pieces_are_the_ids_and_the_text(tokenizer, text):
    ids, trained = encoded(tokenizer, text)
    pieces = pieces_of(ids, trained, tokenizer.backend_tokenizer)
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [piece.position for piece in pieces] == [
        sum(len(before.ids) for before in pieces[:i]) for i in range(len(pieces))
    ]
    learned = [piece.learned for piece in pieces for _ in piece.ids]
    assert learned == trained
    assert (
        "".join(piece.text for piece in pieces)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    )
    assert [piece.text for piece in pieces if piece.control] == ["<|im_start|>", "<|im_end|>"] * 2


def test_a_character_of_many_tokens_is_one_piece(tokenizer):
    ids, trained = encoded(tokenizer, "è 👩‍🚀 中")
    pieces = pieces_of(ids, trained, tokenizer.backend_tokenizer)
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_bytes_that_are_no_character_are_shown_as_broken_ones(tokenizer):
    backend = tokenizer.backend_tokenizer
    (first, *_) = backend.encode("中", add_special_tokens=False).ids
    pieces = pieces_of([first, first], [True, False], backend)
    assert [piece.learned for piece in pieces] == [True, False]
    assert all("\ufffd" in piece.text for piece in pieces)


def test_a_tokenizer_that_writes_spaces_between_words():
    backend = Tokenizer(models.BPE({"▁ciao": 0, "▁mondo": 1, "!": 2}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = pieces_of([0, 1, 2], [True] * 3, backend)
    assert [piece.text for piece in pieces] == ["ciao", " mondo", "!"]


def row(text="<b>ciao</b> & \x00\u200b 'x'\n", learned=True):
    from nesso_tune.publish.view import Piece

    return ViewRow(0, (Part("conversation", "it", 'a"b<c>.jsonl', (Piece(text, (1, 2), 0, learned, False),)),))


def test_no_text_of_the_data_becomes_markup():
    html = page("<title>", [row()], {"x": "<y>"}, ["<note>"])
    for raw in ("<b>", "<c>", "<y>", "<note>", "\x00", "\u200b"):
        assert raw not in html
    assert "\\x00\\u200b" in html, "what cannot be seen is shown"


def test_without_colours_what_is_learned_has_marks():
    plain = "\n".join(lines([row("ciao")], {}, [], 80, colour=False))
    assert "⟦ciao⟧" in plain
    assert "\x1b" not in plain
    coloured = "\n".join(lines([row("ciao")], {}, [], 80, colour=True))
    assert "\x1b[32mciao" in coloured
    assert "⟦" not in coloured


def test_a_long_document_is_cut_where_nothing_is_learned():
    from nesso_tune.publish.view import Piece

    def pieces(text, count, learned):
        return tuple(Piece(f"{text}{i} ", (i,), i, learned, False) for i in range(count))

    offer, call, result, answer = (
        pieces(*p) for p in (("o", 900, False), ("c", 40, True), ("r", 50, False), ("a", 9, True))
    )
    part = Part("conversation", "it", "x", offer + call + result + answer)
    text = "\n".join(lines([ViewRow(0, (part,))], {}, [], 200, colour=False))
    assert "780 more tokens: see --html" in text.replace("\n", " ")
    assert all(f"c{i} " in text.replace("\n", " ") for i in range(40))
    learned = Part("conversation", "it", "x", pieces("l", 900, True))
    text = "\n".join(lines([ViewRow(0, (learned,))], {}, [], 200, colour=False)).replace("\n", " ")
    assert "540 more tokens, 540 of them learned: see --html" in text
