"""`nesso-tune report`: which page it writes, and errors."""

import json
from pathlib import Path

import pytest

from nesso_tune.cli.main import main
from tests.support.runs import main_here


@pytest.fixture
def runs(tmp_path):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(
            json.dumps({"nesso_tune": "0.1.0", "recipe": {"train": {"learning_rate": rate}}})
        )
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def code_of(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    return end.value.code


def test_one_run_has_its_report_in_its_folder(runs, capsys):
    assert code_of(runs[0]) == 0
    assert capsys.readouterr().out == f"report  {runs[0]}/report.html\n"
    assert code_of(runs[0], "-o", "x.html") == 5
    assert "-o: the report of one run is report.html in its folder; remove -o" in capsys.readouterr().err


def test_several_runs_are_compared_in_a_file_of_any_name(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert code_of(*runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 variants, 2 runs; they differ in train.learning_rate"
    assert lines[-1] == "report  comparison.html"
    assert "train.learning_rate" in (tmp_path / "comparison.html").read_text()
    assert code_of(*runs, "-o", "c.html") == 0
    assert (tmp_path / "c.html").exists()


def test_a_folder_of_runs_has_an_index(runs, tmp_path, capsys):
    for run in runs:
        (Path(run) / "recipe.yaml").write_text("method: sft")
    assert code_of(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"report  {tmp_path}/index.html\n"
    assert 'href="a/report.html"' in (tmp_path / "index.html").read_text()
    assert code_of(str(tmp_path), "-o", str(tmp_path / "list.html")) == 0
    assert 'href="b/report.html"' in (tmp_path / "list.html").read_text()


def test_a_page_is_written_again_until_it_is_interrupted(runs, monkeypatch):
    written = []

    def sleep(seconds):
        written.append((Path(runs[0]) / "report.html").exists())
        (Path(runs[0]) / "report.html").unlink()
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("nesso_tune.cli.report.time.sleep", sleep)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["report", runs[0], "--follow", "5"])
    assert written == [True, True]


@pytest.mark.parametrize("verb", ["report", "status"])
def test_an_empty_name_is_an_error(capsys, verb):
    code, _, err = main_here(capsys, verb, "")
    assert (code, err) == (2, '"": is an empty name; write a path or a name\n')


def test_a_folder_that_is_no_run_is_named(tmp_path, runs, capsys):
    (tmp_path / "empty").mkdir()
    assert code_of(str(tmp_path / "empty")) == 5
    remedy = "name the output_dir of a run, or a folder of runs"
    assert f"{tmp_path}/empty: is not a run directory and contains none; {remedy}" in capsys.readouterr().err
    assert code_of(runs[0], str(tmp_path / "empty")) == 5
    assert f"{tmp_path}/empty: is not a run directory; name the output_dir of a run" in capsys.readouterr().err


def test_a_damaged_run_is_named(runs, tmp_path, capsys):
    for text in ('{"pl', "[]", '{"nesso_tune": "0.1.0"}'):
        (tmp_path / "a" / "manifest.json").write_text(text)
        assert code_of(*runs, "-o", str(tmp_path / "c.html")) == 5, text
        assert f"{tmp_path}/a" in capsys.readouterr().err
        assert not (tmp_path / "c.html").exists()


def test_the_page_of_a_comparison_is_a_file_in_any_folder(runs, tmp_path, capsys):
    assert code_of(*runs, "-o", str(tmp_path / "new" / "folder" / "c.html")) == 0
    assert (tmp_path / "new" / "folder" / "c.html").is_file()
    assert code_of(*runs, "-o", str(tmp_path / "new")) == 5
    assert f"{tmp_path}/new: is a folder; name a file" in capsys.readouterr().err


def test_lines_that_are_not_read_are_counted(runs, capsys):
    with (Path(runs[0]) / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\xfe\n\n{"step": 2, "lo')
    assert code_of(runs[0]) == 0
    assert f"{runs[0]}/metrics.jsonl: 2 lines are not lines of metrics, and left out" in capsys.readouterr().err
