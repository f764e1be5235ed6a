"""`chat` on the command line, on a model that was never taught anything."""

import io

import pytest

from nesso_tune.run import train
from tests.support.runs import main_here, recipe


@pytest.fixture
def model(tmp_path, talks):
    train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 1}, evaluation=None))
    return tmp_path / "run"


def chat(capsys, *arguments):
    return main_here(capsys, "chat", *arguments)


def test_prompt_prints_the_answer_alone(model, capsys):
    for folder in (model, model / "final"):
        code, out, err = chat(capsys, folder, "--prompt", "Ciao <|im_end|>", "--max-new-tokens", "5")
        assert code == 0
        assert out.endswith("\n")
        assert not err


def test_a_conversation_ends_with_an_empty_line_or_the_end_of_input(model, capsys, monkeypatch):
    for text, answers in (("Ciao\nE poi?\n\n", 2), ("Ciao", 1)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code, out, _ = chat(capsys, model, "--max-new-tokens", "5")
        assert code == 0
        assert out.count("\n") == answers


@pytest.mark.parametrize(("folder", "says"), [("nowhere/final", "train it first"), ("", "no such model folder")])
def test_no_model(tmp_path, capsys, folder, says):
    target = tmp_path / folder if folder else tmp_path / "file"
    if not folder:
        target.write_text("a file")
    code, out, err = chat(capsys, target, "--prompt", "Ciao")
    assert (code, out) == (4, "")
    assert says in err


def test_a_base_model_cannot_chat(capsys, base):
    code, _, err = chat(capsys, base, "--prompt", "Ciao")
    assert code == 4
    assert "has no weights" in err


def test_commands_and_tools_on_a_real_model(model, capsys, monkeypatch, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "meteo", "description": "Il tempo", "parameters": {"type": "object"}}]')
    monkeypatch.setattr("sys.stdin", io.StringIO("Ciao\n/system Sii breve.\nE poi?\n/history\n"))
    code, out, err = chat(
        capsys, model, "--max-new-tokens", "4", "--tools", tools, "--temperature", "0.7", "--top-p", "0.9"
    )
    assert code == 0
    assert out.count("\n") == 2
    assert "system: Sii breve.\nuser: Ciao\n" in err


def test_an_option_without_effect_is_an_error(model, capsys):
    code, _, err = chat(capsys, model, "--prompt", "Ciao", "--top-p", "0.5")
    assert code == 2
    assert "--top-p: has no effect on greedy answers" in err
