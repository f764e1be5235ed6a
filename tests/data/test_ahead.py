"""Data that is prepared while the libraries load: found in the cache, its errors raised once and in their own form."""

import subprocess
import sys
import time

import pytest

from tests.support.runs import command, recipe, sums, write_recipe

HEAD = """
import sys, time
from nesso_tune.data.ahead import prepared_ahead
from nesso_tune.data.prepare import prepare_data
from nesso_tune.recipes import load_recipe
recipe = load_recipe(sys.argv[1])
"""
FOUND = """
with prepared_ahead(prepare_data, recipe):
    assert prepare_data(recipe).report["cache_hit"], "made by the other process"
assert "torch" not in sys.modules
"""
OTHER = """
other = load_recipe(sys.argv[1], overrides={"data.sequence_len": 64})
with prepared_ahead(prepare_data, recipe):
    assert not prepare_data(other).report["cache_hit"], "another recipe does not wait"
"""
GIVEN_UP = """
def slow(recipe):
    time.sleep(600)
began = time.monotonic()
try:
    with prepared_ahead(slow, recipe):
        raise ValueError
except ValueError:
    pass
assert time.monotonic() - began < 60
"""
KILLED = """
import os
def dying(recipe):
    os._exit(9)
with prepared_ahead(dying, recipe):
    assert not prepare_data(recipe).report["cache_hit"], "then it is done here"
"""


@pytest.mark.parametrize("body", [FOUND, OTHER, GIVEN_UP, KILLED], ids=["found", "other", "given up", "killed"])
def test_the_other_process(tmp_path, body):
    file = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [sums(tmp_path)]))
    done = subprocess.run([sys.executable, "-c", HEAD + body, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_data_error_is_said_once_in_its_own_form(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "a", "response": "b", "lang": "it"}\n' * 30 + "{broken\n")
    file = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [source]))
    done = command("train", file)
    assert done.returncode == 3
    assert done.stderr.count(f"{source}:31") == 1
    assert "Traceback" not in done.stderr


def test_a_killed_parent_takes_it_along(tmp_path):
    import psutil

    file = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [sums(tmp_path)]))
    body = "def slow(recipe):\n    time.sleep(600)\nwith prepared_ahead(slow, recipe):\n    time.sleep(600)\n"
    parent = subprocess.Popen([sys.executable, "-c", HEAD + body, file])
    deadline = time.monotonic() + 120
    while not (children := psutil.Process(parent.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (child,) = children
    child.wait(timeout=60)
