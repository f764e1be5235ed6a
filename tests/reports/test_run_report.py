"""`report.html` is complete and self-contained, and hides private sources."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from nesso_tune import make_plan, prepare_data
from nesso_tune.planning.plan import World
from nesso_tune.reports.html import render
from nesso_tune.reports.plots import line_plot
from nesso_tune.reports.run_report import write_report
from nesso_tune.run import train
from tests.support.runs import recipe


def test_the_report_is_complete_and_self_contained(tmp_path, talks, write_rows, chats):
    secret = write_rows(chats, "segretissimo.jsonl")
    some = recipe("sft", tmp_path / "run", [talks])
    sources = (*some.data.sources, some.data.sources[0].model_copy(update={"path": secret, "private": True}))
    some = some.model_copy(update={"data": some.data.model_copy(update={"sources": sources})})
    train(some)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for shown in ("eval_loss/it", "eval_loss/en", "loss/it", "stop_rate", "learning_rate", "talks.jsonl"):
        assert shown in page
    assert page.count("<polyline") >= 10
    assert not re.search(r"https?://|src=|@import", page), "no external resources"
    assert "segretissimo" not in page


def test_text_from_the_data_is_escaped(tmp_path, write_rows):
    rows = [{"prompt": f"<script>alert({i})</script>", "response": "<b>Ciao</b>", "lang": "it"} for i in range(12)]
    train(recipe("sft", tmp_path / "run", [write_rows(rows)], train={"max_steps": 1}))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_alarms_come_first_and_only_if_there_are_any(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    data = prepare_data(some)
    plan = make_plan(some, World(1), data.volume)
    alarm = {"step": 7, "event": "alarm", "alarm": "stop_rate_falls", "value": 0.1, "limit": 0.75, "said": "<b>; do"}
    for lines, expected in (([{"step": 7, "stop_rate": 0.1}], False), ([{"step": 7, "stop_rate": 0.1}, alarm], True)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = write_report(tmp_path, some, plan, data.summary).read_text(encoding="utf-8")
        assert ("Alarms" in page) is expected
    assert page.index("Alarms") < page.index("<svg")
    assert "<td>7</td><td>stop_rate_falls</td><td>&lt;b&gt;; do</td>" in page


def plot(title, names, lines):
    """The figure of a plot, or an empty string."""
    view = line_plot(title, names, lines)
    return "" if view is None else render("line_plot.html.j2", plot=view)


def names(svg):
    """The legend of a figure."""
    return [text.text for text in ET.fromstring(svg).iter("text") if text.get("fill")]


def test_a_plot_shows_a_metric_and_its_breakdown():
    lines = [{"step": i, "loss": 1 / i, "loss/it": 2.0, "loss/source/a/b.jsonl": "nan", "loss/source/c": 3.0,
              "losses": 1.0} for i in (1, 2)]  # fmt: skip
    assert names(plot("Loss", ("loss",), lines)) == ["loss", "loss/it"]
    assert names(plot("By source", ("loss/source",), lines)) == ["loss/source/c"], "numbers only"
    assert plot("Norm", ("grad_norm",), lines) == ""
    assert names(plot("Stop", ("stop_rate",), [{"step": 1, "train_stop_rate": 1.0}])) == ["train_stop_rate"]
    both = [{"step": 1, "stop_rate": 0.5, "train_stop_rate": 1.0}]
    assert names(plot("Stop", ("stop_rate",), both)) == ["stop_rate"]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_curves_and_legend_entries_are_distinct(count):
    lines = [{"step": step, **{f"loss/{chr(97 + i)}": float(i) for i in range(count)}} for step in (1, 5)]
    svg = ET.fromstring(plot("Loss", ("loss",), lines)).find("svg")
    *_, tall = map(float, svg.get("viewBox").split())
    places = [(text.get("x"), text.get("y")) for text in svg.iter("text") if text.get("fill")]
    assert len(set(places)) == count
    assert all(0 < float(y) <= tall for _, y in places)
    looks = {(line.get("stroke"), line.get("stroke-dasharray")) for line in svg.iter("polyline")}
    assert len(looks) == count
