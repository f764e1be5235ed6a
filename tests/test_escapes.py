"""Nothing that a file, a name or a model holds drives the terminal: it is made visible, by every verb."""

import ast
import json
from pathlib import Path

import pytest

from nesso_tune import logs
from nesso_tune.cli.chat import chat
from nesso_tune.conversation import Message
from nesso_tune.generation.inference import ChatModel
from nesso_tune.reports.html import plotly_library
from nesso_tune.runs.metrics_log import MetricsLog
from nesso_tune.training.alarms import Alarms, Measurement
from tests.support.runs import ROOT, main_here, recipe, write_recipe

PACKAGE = ROOT / "nesso_tune"
CASE = ROOT.parent / "shared" / "cases" / "esc.jsonl"
# A title and a cleared screen; C1; direction of writing; a feigned line; zero width; line separators; half a pair.
EVIL = "\x1b]0;pwned\x07\x1b[2J\x1b[31mRED\x9b31m\x7f\u202eold\u2066\u200b\u2028\rfake\b"
NAME = EVIL.replace("[", "").replace("]", "")  # as the name of a file; these would make it a pattern


def is_tame(text, colours=False):
    """Whether a text could not drive a terminal; line breaks and tabs are its own."""
    bare = logs.COLOUR.sub("", text) if colours else text
    return not logs.UNSAFE.search(bare.replace("\n", "").replace("\t", ""))


def test_what_is_made_visible():
    assert logs.visible("Perché no? 👩‍👩‍👧 مرحبا 10\xa0000") == "Perché no? 👩‍👩‍👧 مرحبا 10\xa0000", "text is text"
    for character in (*map(chr, range(32)), "\x7f", *map(chr, range(0x80, 0xA0)), *"\u202a\u202e\u2066\u2069\u200b",
                      "\u2028", "\u2029", "\ud800", "\ufeff", "\U000e0041"):  # fmt: skip
        shown = logs.visible(f"a{character}b")
        assert shown.isprintable(), ascii(character)
        assert json.loads(f'"{shown}"') == f"a{character}b", "the escapes are those of JSON"
    assert logs.visible("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\u001b"


def test_only_one_module_prints():
    """So that what is printed next year is made visible too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "typer.echo", "click.echo", "traceback.print_exc"), (
                    f"{path}:{node.lineno}"
                )
                assert not called.endswith(("stdout.write", "stderr.write")), f"{path}:{node.lineno}"


@pytest.fixture
def evil(write_rows):
    """A file whose name, columns, roles, tools and texts are hostile."""
    tools = [{"name": f"fn{EVIL}", "parameters": {}}]
    rows = [
        {"messages": [{"role": "user", "content": f"ciao {EVIL} {i}"}, {"role": "assistant", "content": f"sì {EVIL}"}],
         f"col{EVIL}": EVIL, "tools": tools, "language": "it"}
        for i in range(12)
    ]  # fmt: skip
    unknown = {"messages": [{"role": EVIL, "content": "x"}, {"role": "assistant", "content": "y"}]}
    wrong = {"messages": rows[0]["messages"], "tools": [{"name": EVIL, "parameters": {"required": [EVIL]}}]}
    return write_rows([*rows, unknown, wrong], f"{NAME}.jsonl")


def test_every_verb_shows_hostile_data(tmp_path, evil, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"sources": [{"path": evil, "alias": f"alias{EVIL}"}], "sequence_len": 2048}
    some = recipe("sft", f"run{NAME}", [], data=data, train={"max_steps": 2},
                  evaluation={"samples": 2, "max_new_tokens": 4})  # fmt: skip
    path = write_recipe(tmp_path / f"r{NAME}.yaml", some)
    other = recipe("sft", "x", [], data={"sources": [{"path": evil, "messages_field": f"no{EVIL}"}]})
    missing = write_recipe(tmp_path / f"m{NAME}.yaml", other)
    pages = [tmp_path / "page.html"]
    for code, *arguments in (
        (0, "init", f"new{NAME}", "--data", evil, "--base", str(ROOT / "recipes" / "quickstart" / "base")),
        (0, "check", path), (0, "check", path, "--json"), (0, "prepare", path), (0, "prepare", path, "--json"),
        (0, "preview", path), (0, "preview", path, "--html", str(pages[0])), (0, "train", path),
        (0, "launch", path, "--print"),
        (2, "train", path, "--set", f"seed{EVIL}=1"), (2, "check", f"no{NAME}.yaml"), (2, "check", path, f"--{EVIL}"),
        (2, "train", path, "--set", f"train.schedule.type={json.dumps(EVIL)}"), (3, "prepare", missing),
        (3, "prepare", missing, "--debug"), (4, "chat", f"none{NAME}"), (2, "train", path, "--allow-changes", EVIL),
    ):  # fmt: skip
        ended, out, err = main_here(capsys, *arguments)
        assert ended == code, (arguments[0], err)
        assert is_tame(out + err), (arguments, ascii(out + err))
        if "--json" in arguments:
            assert json.loads(out)
        if arguments[0] in ("prepare", "preview", "check", "init") and code == 0 and len(arguments) == 2:
            assert "\\u001b" in out or "\\x1b" in out, "it is there to be seen"
    library = plotly_library().decode()
    for page in (*pages, *Path(f"run{NAME}").glob("*.html")):
        text = page.read_text(encoding="utf-8").replace(library, "")
        assert is_tame(text), page.name
    assert is_tame((Path(f"run{NAME}") / "final" / "README.md").read_text(encoding="utf-8"))


def test_a_line_break_in_a_name_feigns_no_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = main_here(capsys, "check", "no\nrecipe.yaml: valid\n.yaml")
    assert code == 2
    assert said.count("\n") == 1


def test_colours_of_the_preview_are_ours_alone(capsys):
    logs.print_text("\x1b[32mverde\x1b[0m \x1b[2J\x1b]0;x\x07", coloured=True)
    assert capsys.readouterr().out == "\x1b[32mverde\x1b[0m \\u001b[2J\\u001b]0;x\\u0007"


@pytest.mark.parametrize("talking", [False, True])
def test_what_a_model_says_in_chat(monkeypatch, capsys, talking):
    """The words of a model, calls of tools and the history; line breaks and tabs are the model's own."""
    call = f"<tool_call>\n{json.dumps({'name': f'f{EVIL}', 'arguments': {'a': EVIL}})}\n</tool_call>"

    def answer(self, messages, sampling=None, language="und", on_text=None, tools=()):
        if on_text is not None:
            on_text(f"uno\n\tdue {EVIL}{call}")
        return f"uno\n\tdue {EVIL}{call}"

    monkeypatch.setattr(ChatModel, "generate", answer)
    monkeypatch.setattr(ChatModel, "read", lambda self, text: Message("assistant", text))
    monkeypatch.setattr(ChatModel, "remaining_context", lambda self, *_: 10_000)
    monkeypatch.setattr("nesso_tune.generation.inference.load_chat_model", lambda model: ChatModel(None, None))
    asked, lines = [], iter(["ciao", "", "/history", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or next(lines))
    prompt = None if talking else "Ciao"
    chat(f"model{EVIL}", prompt, system=None, language=None, tools=None, max_new_tokens=8, temperature=0.0, top_p=1.0)
    out, err = capsys.readouterr()
    assert "uno\n\tdue \\u001b" in out
    assert is_tame(out + err + "".join(asked)), ascii(out + err)
    assert not talking or "calls f\\u001b" in err


def test_alarms_and_bars(tmp_path, capsys, monkeypatch):
    alarms = Alarms(MetricsLog(tmp_path / "m.jsonl", writes=True), "sft", 9, enabled=True)
    reading = Measurement("alarm", "figure", 1.0, 0.5, 0.1, f"said {EVIL}")
    monkeypatch.setattr(alarms, "started_by", lambda line: [reading])
    alarms.check({"step": 1})
    assert is_tame(capsys.readouterr().err)


@pytest.mark.skipif(not CASE.is_file(), reason="the shared cases are not here")
def test_the_shared_case(tmp_path, capsys):
    some = recipe("sft", tmp_path / "run", [CASE], data={"sequence_len": 1024})
    path = write_recipe(tmp_path / "r.yaml", some)
    for arguments in (("prepare", path), ("preview", path), ("init", tmp_path / "i", "--data", CASE)):
        _, out, err = main_here(capsys, *arguments)
        assert is_tame(out + err), arguments
