"""Messages are records of one logger: a program that uses the library sees warnings and can capture them."""

import json
import logging
import re
import socket
import subprocess
import sys

import pytest
import torch

from nesso_tune import train
from nesso_tune.cache import get_or_build
from nesso_tune.logs import (
    EVERY_RANK,
    STAMP_VARIABLE,
    logger,
    message_prefix,
    messages_on_stderr,
    output_flags,
    print_error,
    print_to_stderr,
    set_output,
    with_figures,
)
from tests.support.logs import logged
from tests.support.processes import Forked
from tests.support.runs import recipe, write_recipe

SLOW = "bfloat16 is slow on this CPU: model.dtype: float32 is faster here"
DROPPED = "9 of 10 rows kept; dropped: 1 no_assistant_turn"


@pytest.fixture
def some(tmp_path, write_rows, chats):
    """A recipe with two warnings on a CPU without bfloat16; its data has two languages, which is no warning."""
    rows = [*chats[:9], {**chats[9], "messages": chats[9]["messages"][:1]}]
    data = {"sources": [{"path": write_rows(rows)}]}
    return recipe("sft", tmp_path / "run", [], data=data, model={"dtype": "bfloat16"}, train={"max_steps": 1},
                  evaluation=None)  # fmt: skip


def test_a_program_that_configures_nothing_sees_the_warnings(tmp_path, some):
    run = Forked(write_recipe(tmp_path / "r.yaml", some), module="tests.support.library_user")
    assert run.wait() == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if line != SLOW] == [DROPPED]


def test_warnings_and_information_have_their_levels(some, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="nesso_tune")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    train(some)
    found = {(record.name, record.levelname, record.getMessage()) for record in caplog.records}
    assert {("nesso_tune", "WARNING", DROPPED), ("nesso_tune", "WARNING", SLOW)} <= found


def test_bfloat16_is_not_called_slow_where_the_cpu_multiplies_it(some, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    with logged() as messages:
        train(some)
    assert DROPPED in messages
    assert SLOW not in messages


FIRST_IMPORT = """
import importlib.abc, logging, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes":
            print(logging.getLevelName(logging.getLogger("bitsandbytes.backends.cpu.ops").getEffectiveLevel()))
            raise ImportError
sys.meta_path.insert(0, Watch())
import importlib
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", ["run", "export.exporter", "evaluation.run", "generation.inference"])
def test_bitsandbytes_is_quiet_before_anything_imports_it(module):
    """It warns on CPUs with AVX512 when it is imported, also where no recipe asks for it."""
    found = subprocess.run([sys.executable, "-c", FIRST_IMPORT, f"nesso_tune.{module}"], capture_output=True, text=True)
    assert set(found.stdout.split()) <= {"ERROR"}, found.stderr


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


@pytest.fixture
def output():
    """Sets how messages are printed, for one test."""
    yield set_output
    set_output(as_json=False, quiet=False)


def test_lines_of_figures_have_the_time(capsys):
    with messages_on_stderr():
        logger.info("step 1/2", extra=with_figures({"loss": 1.0}))
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 1/2\n", capsys.readouterr().err)


def test_messages_as_json(output, capsys):
    output(as_json=True, quiet=False)
    assert output_flags() == ["--json-logs"], "`launch` passes them on"
    with messages_on_stderr(), message_prefix("sft.yaml"):
        logger.warning("of\n%s", "it")
        logger.info("step 1/2", extra=with_figures({"loss": float("nan"), "step": 1}))
    print_error("r.yaml:1: is wrong; correct it")
    warning, figures, error = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", warning.pop("time"))
    assert warning == {"level": "warning", "message": "of\\u000ait", "recipe": "sft.yaml"}
    assert (figures["message"], figures["loss"], figures["step"]) == ("step 1/2", "nan", 1)
    assert (error["level"], error["message"]) == ("error", "r.yaml:1: is wrong; correct it")


def test_quiet_messages_are_warnings_and_errors(output, capsys):
    output(as_json=False, quiet=True)
    with messages_on_stderr():
        logger.info("step 1/2", extra=with_figures({}))
        logger.warning("9 of 10 rows kept")
    print_error("r.yaml: is wrong; correct it")
    assert capsys.readouterr().err.splitlines() == ["9 of 10 rows kept", "r.yaml: is wrong; correct it"]
    assert output_flags() == ["--quiet"]


def test_messages_of_jobs_begin_with_time_host_and_rank(capsys, monkeypatch):
    with messages_on_stderr():
        logger.info("one")
        monkeypatch.setenv(STAMP_VARIABLE, "1")
        logger.info("two")
        monkeypatch.setenv("RANK", "3")
        logger.warning("three", extra=EVERY_RANK)
        print_to_stderr("four\n", "five")
    one, two, *others = capsys.readouterr().err.splitlines()
    time, host = r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.escape(socket.gethostname())
    assert one == "one"
    assert re.fullmatch(f"{time} {host}: two", two)
    for line, text in zip(others, ("three", r"four\u000a", "five"), strict=True):
        assert re.fullmatch(f"{time} {host} rank 3: {re.escape(text)}", line)
