"""Messages are records of one logger: a program that uses the library sees warnings and can capture them."""

import logging

import pytest

from nesso_tune import train
from nesso_tune.cache import get_or_build
from nesso_tune.logs import EVERY_RANK, logger, message_prefix, messages_on_stderr
from tests.support.logs import logged
from tests.support.processes import Forked
from tests.support.runs import recipe, write_recipe

SLOW = "bfloat16 is slow on a CPU: model.dtype: float32 is faster here"
DROPPED = "9 of 10 rows kept; dropped: 1 no_assistant_turn"


@pytest.fixture
def some(tmp_path, write_rows, chats):
    """A recipe with two warnings, and with messages that are not warnings: its data has two languages."""
    rows = [*chats[:9], {**chats[9], "messages": chats[9]["messages"][:1]}]
    data = {"sources": [{"path": write_rows(rows)}]}
    return recipe("sft", tmp_path / "run", [], data=data, model={"dtype": "bfloat16"}, train={"max_steps": 1},
                  evaluation=None)  # fmt: skip


def test_a_program_that_configures_nothing_sees_the_warnings(tmp_path, some):
    run = Forked(write_recipe(tmp_path / "r.yaml", some), module="tests.support.library_user")
    assert run.wait() == 0, run.stderr
    assert run.stderr.splitlines() == [SLOW, DROPPED]


def test_warnings_and_information_have_their_levels(some, caplog):
    caplog.set_level(logging.INFO, logger="nesso_tune")
    train(some)
    found = {(record.name, record.levelname, record.getMessage()) for record in caplog.records}
    assert {("nesso_tune", "WARNING", DROPPED), ("nesso_tune", "WARNING", SLOW)} <= found


def test_ranks_other_than_the_first_are_silent_but_for_their_own_faults(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with logged() as messages:
        logger.warning("of all ranks the same")
        logger.warning("of this one", extra=EVERY_RANK)
    assert messages == ["of this one"]

    def write(folder):
        (folder / "data").write_text("whole")
        return {}

    def build():
        return get_or_build("things", "0" * 8, write, lambda folder, _: folder, "a thing")[0]

    (build() / "data").write_text("other")
    with logged() as messages:
        build()
    assert messages == [f"a thing in {build()} is damaged (data): building it again"]


def test_every_handler_gets_control_characters_as_escapes(caplog):
    logger.warning("%s of %s", "a\x1b[2J", "b\nc\u202e")
    assert caplog.messages == ["a\\u001b[2J of b\\u000ac\\u202e"]


def test_the_command_line_prints_information_once_and_with_the_name_of_the_run(capsys):
    root, second = logging.getLogger(), logging.StreamHandler()
    root.addHandler(second)  # as a library does that calls `logging.basicConfig`
    try:
        with messages_on_stderr():
            logger.info("before")
            logger.debug("hidden")
            with message_prefix("sft.yaml"):
                logger.info("resuming")
            logger.info("after")
    finally:
        root.removeHandler(second)
    logger.info("outside")
    assert capsys.readouterr().err.splitlines() == ["before", "sft.yaml: resuming", "after"]
