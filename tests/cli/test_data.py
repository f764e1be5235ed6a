"""`nesso-tune prepare` as a user meets it."""

import json
from pathlib import Path

import pytest

from nesso_tune import load_recipe
from nesso_tune.cli.main import main
from nesso_tune.runs.run_directory import open_run


@pytest.fixture
def recipe(base, chats, write_rows, tmp_path):
    """A recipe file over ten conversations."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"method: sft\noutput_dir: {tmp_path}/run\nmodel: {{base: {base}}}\n"
        f"data: {{sequence_len: 256, validation_size: 2, sources: [{{path: {write_rows(chats)}}}]}}\n"
    )
    return str(path)


def run(*arguments):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as end:
        main(["prepare", *arguments])
    return end.value.code or 0


def test_the_report_is_printed(recipe, capsys):
    assert run(recipe) == 0
    out = capsys.readouterr().out
    assert "10 read, 10 kept; dropped: none" in out
    assert "cache     made, fingerprint" in out
    rows = {line[:28].strip(): line[28:].split() for line in out.splitlines()}
    assert rows["language it"][0] == rows["language en"][0] == "5"
    assert rows["validation"][0] == "2"
    assert rows["train, per epoch"][0] == "8"
    assert run(recipe) == 0
    assert "cache     found" in capsys.readouterr().out


def test_json_is_the_report(recipe, capsys):
    assert run(recipe, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows_read"], report["rows_kept"], report["dropped"], report["cache_hit"]) == (10, 10, {}, False)
    assert report["train"]["rows"] + report["validation"]["rows"] == 10
    assert report["packing"].keys() == {"rows", "fill"}


def test_a_page_is_written_into_the_run_directory_and_training_takes_it_over(
    recipe, capsys, tmp_path, base, write_rows
):
    unusable = write_rows([{"messages": [{"role": "user", "content": "q"}]}], "unusable.jsonl")
    assert run(recipe, "--set", f"data.sources=[{{path: {tmp_path}/rows.jsonl}}, {{path: {unusable}}}]") == 0
    out = capsys.readouterr().out
    assert f"report             {tmp_path}/run/data_report.html" in out
    listed = Path(out.split("all dropped rows   ")[1].split("\n")[0])
    assert json.loads(listed.read_text())["reason"] == "no_assistant_turn"
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["rows_read"] == 11
    assert open_run(load_recipe(recipe)).checkpoint is None  # not a foreign folder


def test_a_folder_that_cannot_be_written_is_said_and_no_error(recipe, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run(recipe, "--set", f"output_dir={tmp_path}/file/run") == 0
    assert "no data_report.html" in capsys.readouterr().err


def test_settings_override(recipe, capsys):
    assert run(recipe, "--json", "--set", "data.validation_size=0", "--set", "data.packing=false") == 0
    assert json.loads(capsys.readouterr().out)["packing"]["rows"] == 10


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "rows.jsonl: is empty; "), ('{"a": \n', "rows.jsonl:1: is not JSON"), (None, "rows.jsonl: no such file; "),
     ('{"x": 1}\n', "its format is not recognised"),
     ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "contains pref"),
     ('{"messages": [{"role": "user", "content": "q"}]}', "none of 1 rows can be used (no_assistant_turn: 1, e.g. ")],
)  # fmt: skip
def test_bad_data_ends_with_3_and_one_line(recipe, tmp_path, capsys, content, expected):
    (tmp_path / "rows.jsonl").unlink()
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    assert run(recipe) == 3
    said = capsys.readouterr()
    assert expected in said.err
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_a_damaged_tokenizer_ends_with_4(recipe, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    assert run(recipe, "--set", f"model.base={tmp_path}/base") == 4
    assert "its tokenizer cannot be read" in capsys.readouterr().err


def test_a_wrong_recipe_ends_with_2(recipe, capsys):
    assert run(recipe, "--set", "data.validation_size=10") == 2
    assert "leave nothing to train on" in capsys.readouterr().err


def test_fetch_only_downloads_and_encodes_nothing(base, chats, write_rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(tmp_path / "cache"))
    rows, other = write_rows(chats), tmp_path / "other.jsonl"
    other.write_bytes(Path(rows).read_bytes())
    (path := tmp_path / "r.yaml").write_text(
        f"method: sft\noutput_dir: {tmp_path}/run\nmodel: {{base: {base}}}\n"
        f"data: {{sources: [{{path: 'file://{rows}'}}, {{path: {other}, private: true}}]}}\n"
    )
    assert run(str(path), "--fetch-only") == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"base    {base}: {base}", f"source  file://{rows}: complete", "source  private source 2: complete",
    ]  # fmt: skip
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == ["remote"]
    assert not (tmp_path / "run").exists()
    assert run(str(path), "--fetch-only", "--json") == 2
    later = ["--set", f"model.base={tmp_path}/first/final"]
    assert run(str(path), "--fetch-only", *later) == 0
    assert f"base    {tmp_path}/first/final: an earlier recipe creates it" in capsys.readouterr().out
    other.unlink()
    assert run(str(path), "--fetch-only") == 3
