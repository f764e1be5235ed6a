"""`chat` on the command line, on a model that was never taught anything."""

import io
import json

import pytest

from nesso_tune import DataError, Message
from nesso_tune.chat.render import parse_tool_calls
from nesso_tune.cli.chat import ChatSession, run_session
from nesso_tune.data.tools import read_tool_file
from nesso_tune.generation.inference import Sampling
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


def test_bytes_that_are_not_utf8_are_replaced(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe ciao\nE poi?\n/history\n"), "utf-8"))
    code, out, err = chat(capsys, model, "--max-new-tokens", "5")
    assert code == 0, err
    assert out.count("\n") == 2
    assert "user: \ufffd\ufffd ciao\n" in err
    code, _, err = chat(capsys, model, "--max-new-tokens", "5", "--prompt", "\udcff ciao", "--system", "\udcff")
    assert code == 0, err


@pytest.mark.parametrize(("temperature", "expected"), [("1e-40", 0), ("inf", 2)])
def test_temperatures_that_cannot_be_sampled(model, capsys, temperature, expected):
    code, _, err = chat(capsys, model, "--prompt", "Ciao", "--max-new-tokens", "5", "--temperature", temperature)
    assert code == expected, err
    assert ("temperature: must be a finite number of at least 0" in err) == (expected == 2)


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
    assert "--top-p: has no effect on greedy decoding" in err


CALL = '<tool_call>\n{"name": "meteo", "arguments": {"città": "Torino"}}\n</tool_call>'


class Scripted:
    """Answers in a fixed order and remembers what it was asked; each turn takes ten tokens of its context."""

    def __init__(self, *answers, context=1000):
        self.answers, self.asked, self.context = list(answers), [], context

    def generate(self, messages, sampling, language, on_text=None, tools=()):
        self.asked.append((list(messages), language, tools))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        if on_text:
            on_text(answer)
        return answer

    def read(self, answer):
        return Message("assistant", answer)

    def remaining_context(self, messages, language, tools=()):
        return self.context - 10 * len(messages)


def talk(talker, *typed, **options):
    """Types some lines; returns the session, what the model wrote, and the notes."""
    session = ChatSession(talker, Sampling(max_new_tokens=10), **options)
    wrote, notes, rest = [], [], list(typed)

    def read(prompt):
        if not rest:
            raise EOFError
        return rest.pop(0)

    run_session(session, read, wrote.append, notes.append)
    return session, "".join(wrote), "".join(notes)


def contents(messages):
    return [(m.role, m.content) for m in messages]


def test_the_model_reads_what_was_said_before():
    talker = Scripted("uno", "due")
    _, wrote, _ = talk(talker, "a", "b", system="S")
    assert wrote == "uno\ndue\n"
    assert contents(talker.asked[1][0]) == [("system", "S"), ("user", "a"), ("assistant", "uno"), ("user", "b")]


def test_the_language_is_told_from_the_first_turn_or_given():
    italian = "Qual è la capitale d'Italia, per favore?"
    talker = Scripted("x", "y")
    talk(talker, italian, "What is the capital of France, please?")
    assert [language for _, language, _ in talker.asked] == ["it", "it"]
    talker = Scripted("x")
    talk(talker, italian, language="fr")
    assert talker.asked[0][1] == "fr"


def test_commands():
    talker = Scripted("uno", "due", "tre")
    session, _, notes = talk(talker, "a", "/system Breve", "b", "/undo", "/history", "/reset", "c", "/system", "/what")
    assert contents(talker.asked[1][0])[0] == ("system", "Breve")
    assert "user: a\nassistant: uno\n" in notes
    assert "user: b" not in notes
    assert contents(session.messages) == [("user", "c"), ("assistant", "tre")]
    assert session.system is None
    assert "/undo" in notes, "an unknown command shows the help"


def test_it_ends_with_a_command_or_the_input_and_an_empty_line_does_nothing():
    for end in (["/exit", "b"], ["exit", "b"], ["", "  "], []):
        talker = Scripted("uno", "due")
        talk(talker, "a", *end)
        assert len(talker.asked) == 1


def test_calls_are_shown_and_results_asked_for():
    talker = Scripted(f"Guardo.\n{CALL}", "C'è il sole.")
    session, wrote, notes = talk(talker, "Che tempo fa?", '{"sole": true}', tools=({"name": "meteo"},))
    assert 'calls meteo(città="Torino")' in notes
    assert wrote.endswith("C'è il sole.\n")
    assert talker.asked[0][2] == ({"name": "meteo"},)
    assert contents(session.messages)[2] == ("tool", '{"sole": true}')


def test_two_calls_take_two_results_and_none_is_an_answer_too():
    talker = Scripted(CALL + CALL, "fatto")
    talk(talker, "q", "uno", "due")
    assert contents(talker.asked[1][0])[2:] == [("tool", "uno"), ("tool", "due")]
    talker = Scripted(CALL, "x")
    session, _, _ = talk(talker, "q", "", "altro")
    assert contents(session.messages)[2] == ("user", "altro")


def test_what_no_longer_fits_is_left_out_and_said():
    talker = Scripted("uno", "due", "tre", context=50)
    session, _, notes = talk(talker, "a", "b", "c", system="S")
    assert contents(talker.asked[2][0]) == [("system", "S"), ("user", "b"), ("assistant", "due"), ("user", "c")]
    assert "no longer fit" in notes
    assert len(session.messages) == 6, "nothing is forgotten: /undo and /history still have it"


def test_an_interrupted_answer_takes_the_turn_back():
    talker = Scripted(KeyboardInterrupt(), "uno")
    session, _, notes = talk(talker, "a", "b")
    assert contents(session.messages) == [("user", "b"), ("assistant", "uno")]
    assert "your turn was removed" in notes


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, [{"name": "meteo", "arguments": {"città": "Torino"}}]),
        ("<tool_call>{broken</tool_call>", []),
        ("<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": "f"}</tool_call> <tool_call>{"name": "g", "arguments": null}</tool_call>',
         [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]),
        ("no call", []),
    ],
)  # fmt: skip
def test_calls_in_an_answer(text, calls):
    assert parse_tool_calls(text) == calls


def test_a_file_of_tools(tmp_path):
    file = tmp_path / "tools.json"
    for content in ([{"name": "f"}], {"tools": [{"name": "f"}]}, {"name": "f"}):
        file.write_text(json.dumps(content))
        assert [tool["function"]["name"] for tool in read_tool_file(file)] == ["f"]
    for wrong in ("{", "[1]", '[{"description": "x"}]'):
        file.write_text(wrong)
        with pytest.raises(DataError, match="is not a list of tools"):
            read_tool_file(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_tool_file(tmp_path / "absent.json")


def test_a_message_of_the_model_is_kept_as_text():
    talker = Scripted(CALL)
    session, _, _ = talk(talker, "q")
    assert session.messages[1] == Message("assistant", CALL)
