"""Progress as it is seen: in a terminal of 80 and of 140 columns, in a log file and in a notebook."""

import logging
import re
import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from nesso_tune.logs import logger, set_output
from nesso_tune.training.callbacks import NotebookBar, ProgressCallback, TerminalBar, clock
from tests.support.logs import logged

LOGS = {"loss": 1.23456, "learning_rate": 3e-4, "tokens_per_second": 12345.6}
LINE = r"step 120/300 epoch 1.20 ETA 0:\d\d loss 1.2346 lr 3.00e-04 12,346 tok/s"


def train(callback, log=True):
    """The calls of a trainer at the steps 119 and 120 of 300."""
    state = TrainerState(global_step=118, max_steps=300, epoch=1.2)
    arguments = (None, state, TrainerControl())
    callback.on_train_begin(*arguments)
    for state.global_step in (119, 120):
        callback.on_step_end(*arguments)
    callback.on_log(*arguments, logs=LOGS if log else {"eval_loss": 1.0})
    callback.on_evaluate(*arguments, metrics={"eval_loss": 1.5, "stop_rate": 0.75, "answers": 8})
    callback.on_step_end(*arguments)


def test_a_message_of_each_log_line_has_epoch_and_time_left():
    with logged() as said:
        train(ProgressCallback("run"))
    assert re.fullmatch(LINE, said[0])
    assert re.fullmatch(r"step 120/300 epoch 1.20 ETA 0:\d\d evaluation eval_loss 1.5 stop_rate 0.75", said[1])


def test_durations():
    assert [clock(seconds) for seconds in (0.2, 65, 3665, 90061)] == ["0:00", "1:05", "1:01:05", "25:01:01"]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("is_message", [False, True])
def test_a_terminal(width, is_message, monkeypatch):
    """The bar is one line that begins with step and time left; the log lines stay above it, whole."""
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=width, highlight=False, color_system=None)
    monkeypatch.setattr(TerminalBar, "open", classmethod(lambda cls, name: cls(name, console)))
    monkeypatch.setattr(logger, "level", logging.INFO if is_message else logging.WARNING)
    logger.manager._clear_cache()
    callback = ProgressCallback("a-run-with-a-long-name-that-does-not-fit-into-a-terminal-of-eighty-columns")
    train(callback)
    parts = [re.sub("\x1b.*?[A-Za-z]", "", part) for part in re.split(r"[\r\n]", screen.getvalue())]
    bars = [part for part in parts if "━" in part]
    assert bars
    assert all(re.match(r"step 1\d\d/300 ETA 0:\d\d ━{7,8}─{12,13} ", bar) for bar in bars)
    assert all(len(bar) <= width for bar in bars)
    assert "loss 1.2346" in bars[-1]
    assert bool(re.search(r"\d\d:\d\d:\d\d " + LINE, screen.getvalue())) is not is_message, "not shown twice"
    callback.close()
    logger.manager._clear_cache()


def test_a_notebook_shows_plain_text_that_does_not_restyle_it(monkeypatch):
    shown = []

    def display(data, *, raw, display_id):
        return SimpleNamespace(update=lambda data, raw: shown.append(data))

    module = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    callback = ProgressCallback("<run>")
    train(callback)
    callback.close()
    last = shown[-1]
    assert re.match(r"<run> step 120/300 ETA 0:\d\d ━{16}─{24}\n\d\d:\d\d:\d\d " + LINE, last["text/plain"])
    assert last["text/html"].startswith("<pre>&lt;run&gt; step 120/300")
    assert not re.search(r"<(?!/?pre>)", last["text/html"]), "no other tag: no style, no script"


def test_no_bar_where_nobody_looks_at_one(monkeypatch):
    assert NotebookBar.open("run") is None
    assert TerminalBar.open("run") is None, "stderr is no terminal"
    monkeypatch.setattr(TerminalBar, "open", classmethod(lambda cls, name: pytest.fail("a bar")))
    for flags in ({"as_json": True, "quiet": False}, {"as_json": False, "quiet": True}):
        set_output(**flags)
        try:
            train(ProgressCallback("run"))
        finally:
            set_output(as_json=False, quiet=False)
