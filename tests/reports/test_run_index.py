"""`index.html`: every run of a folder, with a link to a report that is not older than the run."""

import os
import re
import time

import pytest

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.reports.run_index import write_index
from tests.support.run_directories import write_run

LINES = [{"step": 3, "loss": 2.5, "tokens_per_second": 1234.5}, {"step": 3, "eval_loss": 1.25}]


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "outputs" / "a", LINES)
    write_run(tmp_path / "outputs" / "deep" / "b #1,x=<i>", [{"step": 2, "loss": "nan"}], state="training")
    accuracy = {"step": 9, "eval_loss": 0.7, "eval_rewards/accuracies": 0.875}
    write_run(tmp_path / "outputs" / "c", [accuracy], recipe={"method": "dpo"}, state="failed")
    write_run(tmp_path / "outputs" / "a" / "checkpoint-3", LINES, state=None)
    return tmp_path / "outputs"


def rows_of(page):
    return [re.sub(r"<[^>]+>", "|", row) for row in re.findall(r"<tr><td>.*?</tr>", page.read_text(encoding="utf-8"))]


def test_all_runs_are_listed_with_links_to_their_reports(folder):
    page = write_index(folder)
    assert page == folder / "index.html"
    a, c, b = rows_of(page)
    started = time.strftime("%Y-%m-%d")
    assert re.search(rf"\|a\|.*\|finished\|.*3 of 3\|.*2.5\|.*eval_loss\| 1.25\|.*1,234\|.*{started} \d\d:\d\d", a)
    assert re.search(r"\|c\|.*\|failed\|.*9 of 9\|.*eval_rewards/accuracies\| 0.875\|", c)
    assert "deep/b #1,x=&lt;i&gt;" in b
    assert "gone" in b
    assert " s ago" in a
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'href="(.*?)"', text) == [
        "a/report.html", "c/report.html", "deep/b%20%231%2Cx%3D%3Ci%3E/report.html",
    ]  # fmt: skip
    assert all((folder / name / "report.html").is_file() for name in ("a", "c", "deep/b #1,x=<i>"))
    assert not re.search(r"https?://|src=|@import|<script", text)


def test_only_reports_that_are_missing_or_old_are_written(folder):
    write_index(folder)
    (a, c) = (folder / name / "report.html" for name in "ac")
    for report in (a, c):
        report.write_text("kept")
    later = time.time() + 60
    os.utime(c.parent / "metrics.jsonl", (later, later))
    write_index(folder)
    assert a.read_text() == "kept"
    assert c.read_text() != "kept"


def test_links_are_relative_to_the_page_and_a_comparison_is_linked(folder, tmp_path):
    (folder / "comparison.html").write_text("")
    page = write_index(folder, tmp_path / "list.html")
    assert 'href="outputs/comparison.html"' in page.read_text()
    assert 'href="outputs/a/report.html"' in page.read_text()


def test_a_folder_without_runs_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunEnvironmentError, match="is not a run directory and contains none; name the output_dir"):
        write_index(tmp_path / "empty")
    with pytest.raises(RunEnvironmentError, match="is not a folder; name the output_dir"):
        write_index(tmp_path / "absent")
