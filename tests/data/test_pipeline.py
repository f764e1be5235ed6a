"""Progress: rows per second and the remaining time, printed only if preparation takes a while."""

import pytest

from nesso_tune.data import pipeline
from tests.support.logs import logged


@pytest.mark.parametrize("terminal", [False, True])
def test_it_says_how_fast_and_how_long(capsys, monkeypatch, terminal):
    clock = iter([0.0, 1.0, 10.0, 10.1, 4000.0])
    monkeypatch.setattr(pipeline, "monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with logged() as messages:
        bar = pipeline.Progress(1000)
        for rows in (10, 90, 1, 399):
            bar.advance(rows, 2 * rows if rows < 399 else 500)
        bar.end()
    shown = [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert (messages if terminal else shown) == []
    lines = shown if terminal else messages
    assert lines == ["100 rows, 10 rows/s, 20%, 0:00:40 left", "500 rows, 0 rows/s, 70%, 0:28:18 left"]


def test_what_is_quick_is_silent(capsys):
    with logged() as messages:
        bar = pipeline.Progress(10)
        bar.advance(5, 10)
        bar.end()
    assert (messages, capsys.readouterr().err) == ([], "")
