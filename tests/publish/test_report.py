"""`report.html`: whole, offline, and silent about private sources."""

import re

from nesso_tune.run import train
from tests.support.runs import recipe


def test_the_report_shows_the_run_and_asks_for_nothing(tmp_path, talks, write_rows, chats):
    secret = write_rows(chats, "segretissimo.jsonl")
    some = recipe("sft", tmp_path / "run", [talks])
    sources = (*some.data.sources, some.data.sources[0].model_copy(update={"path": secret, "private": True}))
    some = some.model_copy(update={"data": some.data.model_copy(update={"sources": sources})})
    train(some)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for shown in ("eval_loss/it", "eval_loss/en", "loss/it", "stop_rate", "learning_rate", "talks.jsonl"):
        assert shown in page
    assert page.count("<polyline") >= 10
    assert not re.search(r"https?://|src=|@import", page), "nothing is fetched"
    assert "segretissimo" not in page


def test_text_of_the_data_cannot_become_markup(tmp_path, write_rows):
    rows = [{"prompt": f"<script>alert({i})</script>", "response": "<b>Ciao</b>", "lang": "it"} for i in range(12)]
    train(recipe("sft", tmp_path / "run", [write_rows(rows)], train={"max_steps": 1}))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
