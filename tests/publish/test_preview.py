"""What preview shows is what is trained."""

import re
from html import unescape

import pytest
from rich.cells import cell_len

from nesso_tune import ModelError, prepare_data, preview
from nesso_tune.cli.main import main
from nesso_tune.recipes.sections import ModelSection
from tests.support.runs import recipe, write_recipe

SPAN = re.compile(r'<span class="([^"]*)" data-ids="([^"]*)" title="[^"]*">(.*?)</span>', re.DOTALL)


def tokens_of(html):
    """(id, learned, control) of every token on a page, and the text of all pieces."""
    spans = SPAN.findall(html)
    tokens = [
        (int(i), "learned" in kind.split(), "control" in kind.split()) for kind, ids, _ in spans for i in ids.split()
    ]
    return tokens, "".join(unescape(text) for _, _, text in spans)


def test_a_packed_row_is_shown_as_it_is_labelled(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    html, data = preview(some, 3).to_html(), prepare_data(some)
    shown, text = tokens_of(html)
    rows = data.train[:3]
    assert [i for i, _, _ in shown] == [i for row in rows for i in row["input_ids"]]
    assert [learned for _, learned, _ in shown] == [label != -100 for row in rows for label in row["labels"]]
    controls = set(data.chat.template.control_tokens)
    assert {data.tokenizer.convert_ids_to_tokens(i) for i, _, control in shown if control} == controls
    assert html.count("<article") == sum(len(row["seq_lengths"]) for row in rows), "a border round every document"
    assert text.replace("↵\n", "\n") == "".join(data.tokenizer.decode(row["input_ids"]) for row in rows)
    assert html.count('data-language="it"') == sum(row["languages"].count("it") for row in rows)


def test_the_first_token_of_a_document_is_never_learned(tmp_path, talks):
    some = recipe(
        "sft", tmp_path / "run", [talks], data={"roles_to_train": ["user", "assistant"], "train_on_eos": "all"}
    )
    for part in preview(some, 2).rows[0].parts:
        assert not part.pieces[0].learned


def test_a_pair_is_shown_as_prompt_chosen_and_rejected(tmp_path, pairs):
    some = recipe("dpo", tmp_path / "run", [pairs])
    view, data = preview(some, 2), prepare_data(some)
    for shown, row in zip(view.rows, data.train[:2], strict=True):
        assert [part.name for part in shown.parts] == ["prompt", "chosen", "rejected"]
        for part in shown.parts:
            assert [i for piece in part.pieces for i in piece.ids] == row[f"{part.name}_ids"]
            assert {piece.learned for piece in part.pieces} == {part.name != "prompt"}


def test_it_works_before_any_weight_is_there(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    model = some.model.model_copy(update={"random_init": False})  # a folder without weights
    assert preview(some.model_copy(update={"model": model}), 1).notes == ()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", ["mii-llm/zagreus-0.4B-ita", "outputs/never-trained/final"])
def test_a_tokenizer_that_is_not_at_hand_is_stood_in_for_and_said(tmp_path, talks, base):
    some = recipe("sft", tmp_path / "run", [talks])
    view = preview(some.model_copy(update={"model": ModelSection(base=base)}), 1)
    assert base in view.notes[0]
    assert "stands in" in str(view)
    assert "stands in" in view.to_html()


def test_a_wrong_base_is_a_mistake(tmp_path, talks):
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
    assert visible[-1].endswith("↵"), "the end of a long document is seen"


def test_many_documents_are_counted_not_listed(tmp_path, talks):
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
