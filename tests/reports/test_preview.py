"""The preview shows exactly the tokens and labels that the collator emits."""

import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nesso_tune import Conversation, Message, ModelError, load_tokenizer, prepare_data, preview
from nesso_tune.chat.tokenizer import encoder_of
from nesso_tune.cli.main import main
from nesso_tune.recipes.sections import ModelSection
from nesso_tune.reports.preview import Part, Piece, Preview, PreviewRow, pieces_of, terminal_lines
from tests.support.examples import examples
from tests.support.runs import recipe, write_recipe

SPAN = re.compile(r'<span class="([^"]*)" data-ids="([^"]*)" title="[^"]*">(.*?)</span>', re.DOTALL)


def tokens_of(html):
    """(id, supervised, control) of every token on a page, and the text of all pieces."""
    spans = SPAN.findall(html)
    tokens = [
        (int(i), "supervised" in kind.split(), "control" in kind.split()) for kind, ids, _ in spans for i in ids.split()
    ]
    return tokens, "".join(unescape(text) for _, _, text in spans)


def test_a_packed_row_shows_its_labels(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    html, data = preview(some, 3).to_html(), prepare_data(some)
    shown, text = tokens_of(html)
    rows = data.train[:3]
    assert [i for i, _, _ in shown] == [i for row in rows for i in row["input_ids"]]
    assert [supervised for _, supervised, _ in shown] == [label != -100 for row in rows for label in row["labels"]]
    controls = set(data.chat.template.control_tokens)
    assert {data.tokenizer.convert_ids_to_tokens(i) for i, _, control in shown if control} == controls
    assert html.count("<article") == sum(len(row["seq_lengths"]) for row in rows), "one article per document"
    assert text.replace("↵\n", "\n") == "".join(data.tokenizer.decode(row["input_ids"]) for row in rows)
    assert html.count('data-language="it"') == sum(row["languages"].count("it") for row in rows)
    in_notebook = preview(some, 1)._repr_html_()
    assert in_notebook.startswith("<iframe ")
    assert in_notebook.count("<") == 2, "its styles stay in the frame"


def test_the_first_token_of_a_document_is_never_supervised(tmp_path, talks):
    some = recipe(
        "sft", tmp_path / "run", [talks], data={"roles_to_train": ["user", "assistant"], "train_on_eos": "all"}
    )
    for part in preview(some, 2).rows[0].parts:
        assert not part.pieces[0].supervised


def test_a_pair_is_shown_as_prompt_chosen_and_rejected(tmp_path, pairs):
    some = recipe("dpo", tmp_path / "run", [pairs])
    view, data = preview(some, 2), prepare_data(some)
    for shown, row in zip(view.rows, data.train[:2], strict=True):
        assert [part.name for part in shown.parts] == ["prompt", "chosen", "rejected"]
        for part in shown.parts:
            assert [i for piece in part.pieces for i in piece.ids] == row[f"{part.name}_ids"]
            assert {piece.supervised for piece in part.pieces} == {part.name != "prompt"}


def test_no_weights_are_needed(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    model = some.model.model_copy(update={"random_init": False})  # a folder without weights
    assert preview(some.model_copy(update={"model": model}), 1).notes == ()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", ["mii-llm/zagreus-0.4B-ita", "outputs/never-trained/final"])
def test_the_bundled_tokenizer_replaces_an_unavailable_one_with_a_note(tmp_path, talks, base):
    some = recipe("sft", tmp_path / "run", [talks])
    view = preview(some.model_copy(update={"model": ModelSection(base=base)}), 1)
    assert base in view.notes[0]
    assert "bundled tokenizer" in str(view)
    assert "bundled tokenizer" in view.to_html()


def test_a_missing_base_folder_is_an_error(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    with pytest.raises(ModelError, match="no such folder"):
        preview(some.model_copy(update={"model": ModelSection(base="./nowhere")}))


@pytest.mark.parametrize("colour", [False, True])
def test_no_line_is_wider_than_the_terminal(tmp_path, write_rows, colour):
    long = "parola " * 900 + "中" * 90 + "x" * 400
    rows = [{"prompt": long, "response": f"{long} {i}", "lang": "it"} for i in range(4)]
    some = recipe("sft", tmp_path / "run", [write_rows(rows)], data={"sequence_len": 8000, "validation_size": 0})
    text = preview(some, 2).to_text(80, colour)
    visible = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert max(map(cell_len, visible)) <= 80
    assert "more tokens" in text
    assert visible[-1].endswith("↵"), "the end of a long document is shown"


def test_many_documents_are_counted_instead_of_listed(tmp_path, talks):
    view = preview(recipe("sft", tmp_path / "run", [talks], data={"sequence_len": 500}), 1)
    count = len(view.rows[0].parts)
    assert count > 5
    assert f"{count - 4} more documents in this row" in view.to_text()


def test_the_command_line(tmp_path, talks, capsys):
    file = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    page = tmp_path / "pages" / "p.html"
    for arguments in (["-n", "1"], ["--rows", "1", "--html", str(page)]):
        with pytest.raises(SystemExit) as end:
            main(["preview", file, *arguments])
        assert not end.value.code
        out, err = capsys.readouterr()
        assert "next: nesso-tune train" in out
        assert not err
    assert "p.html: 1 rows" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


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
    supervised = [piece.supervised for piece in pieces for _ in piece.ids]
    assert supervised == trained
    assert (
        "".join(piece.text for piece in pieces)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"
    )
    assert [piece.text for piece in pieces if piece.control] == ["<|im_start|>", "<|im_end|>"] * 2


def test_a_character_of_many_tokens_is_one_piece(tokenizer):
    ids, trained = encoded(tokenizer, "è 👩‍🚀 中")
    pieces = pieces_of(ids, trained, tokenizer.backend_tokenizer)
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_incomplete_utf8_becomes_replacement_characters(tokenizer):
    backend = tokenizer.backend_tokenizer
    (first, *_) = backend.encode("中", add_special_tokens=False).ids
    pieces = pieces_of([first, first], [True, False], backend)
    assert [piece.supervised for piece in pieces] == [True, False]
    assert all("\ufffd" in piece.text for piece in pieces)


def test_a_tokenizer_that_writes_spaces_between_words():
    backend = Tokenizer(models.BPE({"▁ciao": 0, "▁mondo": 1, "!": 2}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces = pieces_of([0, 1, 2], [True] * 3, backend)
    assert [piece.text for piece in pieces] == ["ciao", " mondo", "!"]


def row(text="<b>ciao</b> & \x00\u200b 'x'\n", supervised=True):
    return PreviewRow(0, (Part("conversation", "it", 'a"b<c>.jsonl', (Piece(text, (1, 2), 0, supervised, False),)),))


def test_text_from_the_data_is_escaped():
    html = Preview("<title>", (row(),), {"x": "<y>"}, ("<note>",)).to_html()
    for raw in ("<b>", "<c>", "<y>", "<note>", "\x00", "\u200b"):
        assert raw not in html
    assert "\\x00\\u200b" in html, "invisible characters are escaped"


def test_without_colours_supervised_text_is_marked():
    plain = "\n".join(terminal_lines([row("ciao")], {}, [], 80, colour=False))
    assert "⟦ciao⟧" in plain
    assert "\x1b" not in plain
    coloured = "\n".join(terminal_lines([row("ciao")], {}, [], 80, colour=True))
    assert "\x1b[32mciao" in coloured
    assert "⟦" not in coloured


def test_a_long_document_is_cut_in_its_unsupervised_part():
    def pieces(text, count, supervised):
        return tuple(Piece(f"{text}{i} ", (i,), i, supervised, False) for i in range(count))

    offer, call, result, answer = (
        pieces(*p) for p in (("o", 900, False), ("c", 40, True), ("r", 50, False), ("a", 9, True))
    )
    part = Part("conversation", "it", "x", offer + call + result + answer)
    text = "\n".join(terminal_lines([PreviewRow(0, (part,))], {}, [], 200, colour=False))
    assert "780 more tokens: see --html" in text.replace("\n", " ")
    assert all(f"c{i} " in text.replace("\n", " ") for i in range(40))
    supervised = Part("conversation", "it", "x", pieces("l", 900, True))
    text = "\n".join(terminal_lines([PreviewRow(0, (supervised,))], {}, [], 200, colour=False)).replace("\n", " ")
    assert "540 more tokens, 540 of them supervised: see --html" in text
