"""`report.html` is complete, works without a network, hides private sources, and is there after every end."""

import json
import math
import re

import pytest

from nesso_tune.errors import NumericalError, RunEnvironmentError
from nesso_tune.reports.charts import MAX_POINTS, run_charts, thinned
from nesso_tune.reports.html import plotly_library
from nesso_tune.reports.run_record import flattened, without_nulls
from nesso_tune.reports.run_report import shown_command, write_report
from nesso_tune.run import train
from nesso_tune.runs.run_status import read_status
from nesso_tune.training.sft import ConversationTrainer
from tests.support.runs import recipe


@pytest.fixture
def talks_run(tmp_path, talks):
    run = tmp_path / "run"
    train(recipe("sft", run, [talks]))
    return run


def own(page):
    """A page without Plotly's code."""
    return page.replace(plotly_library().decode(), "")


def chart_data(page):
    return json.loads(re.search(r'id="chart-data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_report_is_complete_and_self_contained(tmp_path, talks, write_rows, chats):
    secret = write_rows(chats, "segretissimo.jsonl")
    some = recipe("sft", tmp_path / "run", [talks])
    sources = (*some.data.sources, some.data.sources[0].model_copy(update={"path": secret, "private": True}))
    some = some.model_copy(update={"data": some.data.model_copy(update={"sources": sources})})
    train(some)
    whole = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    page = own(whole)
    assert len(whole) < 6_000_000
    assert len(page) < 200_000 < len(whole), "Plotly is in the file"
    for shown in ("finished at step", "eval_loss/it", "eval_loss/en", "loss/it", "stop_rate", "learning_rate",
                  "talks.jsonl", "transformers 5", "expected"):  # fmt: skip
        assert shown in page
    assert "null" not in page[page.index("<h2>Recipe</h2>") :], "only what is set"
    assert not re.search(r"https?://|src=|@import", page), "no external resources"
    assert "segretissimo" not in page


def test_text_from_the_data_is_escaped(tmp_path, write_rows):
    rows = [{"prompt": f"<script>alert({i})</script>", "response": "<b>Ciao</b>", "lang": "it"} for i in range(12)]
    train(recipe("sft", tmp_path / "run", [write_rows(rows)], train={"max_steps": 1}))
    page = own((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page


def test_alarms_resumes_and_failures_are_shown(talks_run, tmp_path):
    run = tmp_path / "copy"
    run.mkdir()
    for name in ("manifest.json", "recipe.yaml", "data_report.json", "status.json"):
        (run / name).write_bytes((talks_run / name).read_bytes())
    alarm = {"step": 7, "event": "alarm", "alarm": "stop_rate_falls", "value": 0.1, "limit": 0.75, "said": "<b>; do"}
    lines = [{"step": 5, "event": "resumed"}, {"step": 7, "stop_rate": 0.1, "loss": "nan"}, alarm]
    for shown in (lines[:2], lines):
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown))
        page = own(write_report(run).read_text(encoding="utf-8"))
        assert ("Alarms" in page) is (alarm in shown)
    assert page.index("Alarms") < page.index("<h2>Curves")
    assert ">stop_rate_falls</td><td>&lt;b&gt;; do</td>" in page
    assert [mark["kind"] for mark in chart_data(page)["marks"]] == ["resumed", "alarm"]
    (run / "status.json").write_text(
        json.dumps({**json.loads((run / "status.json").read_text()), "state": "failed", "message": "loss is nan"})
    )
    page = own(write_report(run).read_text(encoding="utf-8"))
    assert 'class="lead failed">failed at step 7 of' in page
    assert "loss is nan" in page
    assert chart_data(page)["marks"][-1]["kind"] == "end"


def test_a_run_that_diverges_has_a_report_that_says_so(tmp_path, talks, monkeypatch):
    compute = ConversationTrainer.compute_loss

    def nan_in_step_3(self, *arguments, **options):
        return compute(self, *arguments, **options) * (math.nan if self.state.global_step == 2 else 1)

    monkeypatch.setattr(ConversationTrainer, "compute_loss", nan_in_step_3)
    with pytest.raises(NumericalError):
        train(recipe("sft", tmp_path / "run", [talks]))
    status = read_status(tmp_path / "run")
    assert status.state == "failed"
    assert status.ended >= status.started
    page = own((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert re.search(r"failed at step \d of 4: .*loss", page)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/home/anna/.venv/bin/nesso-tune", "train", "my recipe.yaml"], "nesso-tune train 'my recipe.yaml'"),
        (["/opt/lib/nesso_tune/__main__.py", "train", "--set", "seed=1"], "nesso-tune train --set seed=1"),
        (["scripts/run.py", "…", ""], "python scripts/run.py … ''"),
        (["/home/anna/run.py"], "python run.py"),
        (["/usr/lib/ipykernel_launcher.py", "-f", "/home/anna/kernel.json"], "from a notebook"),
        (["/usr/bin/pytest", "-q"], "pytest -q"),
        ([], ""),
    ],
)
def test_the_command_is_shown_as_it_was_typed(words, shown):
    assert shown_command(words) == shown


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(RunEnvironmentError, match="is not a run directory; name the output_dir"):
        write_report(tmp_path)


def curves(charts, title):
    return {series.name: series for chart in charts if chart.title == title for series in chart.series}


def test_a_chart_shows_a_metric_and_its_breakdown():
    lines = [{"step": i, "loss": 1 / i, "loss/it": 2.0, "loss/source/a/b.jsonl": "nan", "loss/source/c": 3.0,
              "losses": 1.0} for i in (1, 2)]  # fmt: skip
    charts = run_charts(lines)
    loss = curves(charts, "Loss")
    assert list(loss) == ["loss", "loss/it"]
    assert (loss["loss"].group, loss["loss"].colour, loss["loss"].y) == ("all", -1, (1.0, 0.5))
    assert (loss["loss/it"].group, loss["loss/it"].part, loss["loss/it"].colour) == ("language", "it", 0)
    assert list(curves(charts, "Loss by source")) == ["c"], "numbers only"
    assert "Gradient norm" not in {chart.title for chart in charts}
    assert list(curves(run_charts([{"step": 1, "train_stop_rate": 1.0}]), "Stop rate")) == ["train_stop_rate"]
    both = [{"step": 1, "stop_rate": 0.5, "train_stop_rate": 1.0}]
    assert list(curves(run_charts(both), "Stop rate")) == ["stop_rate"]


def test_curves_of_one_chart_look_different():
    lines = [{"step": step, **{f"loss/source/{i}": float(i) for i in range(12)},
              **{f"rewards/{kind}{code}": 1.0 for kind in ("chosen", "rejected") for code in ("", "/it", "/en")}}
             for step in (1, 5)]  # fmt: skip
    for chart in run_charts(lines):
        looks = {(series.colour, series.dash) for series in chart.series}
        assert len(looks) == len(chart.series), chart.title


def test_the_planned_learning_rate_is_beside_the_measured_one():
    charts = run_charts([{"step": 1, "learning_rate": 0.1}], ((0, 0.0), (1, 0.1), (2, 0.05)))
    assert curves(charts, "Learning rate")["plan"].y == (0.0, 0.1, 0.05)


def test_a_long_run_keeps_its_ends_and_spikes():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4_321], points[7_777] = (4_321.0, 9.0), (7_777.0, -5.0)
    shown = thinned(points, MAX_POINTS)
    assert len(shown) <= MAX_POINTS
    assert {points[0], points[-1], points[4_321], points[7_777]} <= set(shown)
    assert shown == sorted(shown)
    assert thinned(points[:MAX_POINTS], MAX_POINTS) == points[:MAX_POINTS]


def test_the_recipe_is_shown_without_nulls():
    raw = {"a": None, "b": {"c": None}, "d": [{"e": 1, "f": None}], "g": False}
    assert without_nulls(raw) == {"d": [{"e": 1}], "g": False}
    assert flattened({"a": {"b": 1}, "c": [{"d": 2}], "e": [1, 2]}) == {"a.b": 1, "c.0.d": 2, "e": [1, 2]}
