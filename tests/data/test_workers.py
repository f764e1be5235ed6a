"""Work in several processes: the same results in the same order, faults where they are, nothing left behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from nesso_tune import DataError, RunEnvironmentError, prepare_data
from nesso_tune.data import blocks, files, workers
from nesso_tune.data.files import content_hash
from nesso_tune.data.workers import MIN_PARALLEL_BLOCKS, ReadFiles, parallel_map
from tests.support.runs import fresh_command, recipe, sums, write_recipe

MANY = 40


def where(block):
    if block == "fault":
        raise DataError("rows.jsonl:7", "is wrong", "correct it")
    if block == "end":
        os.kill(os.getpid(), signal.SIGKILL)
    return block, os.getpid()


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: 2)


def test_results_keep_the_order(two_cores):
    results = list(parallel_map(where, range(MANY)))
    assert [block for block, _ in results] == list(range(MANY))
    assert {process for _, process in results}.isdisjoint({os.getpid()})


def test_few_blocks_are_worked_on_here(two_cores):
    assert {process for _, process in parallel_map(where, range(MIN_PARALLEL_BLOCKS - 1))} == {os.getpid()}


def test_an_error_comes_at_its_turn(two_cores):
    results = parallel_map(where, [*range(9), "fault", *range(9)])
    assert [block for block, _ in islice(results, 9)] == list(range(9))
    with pytest.raises(DataError, match=r"rows.jsonl:7: is wrong; correct it"):
        next(results)


@pytest.mark.parametrize("before", [1, MANY])
def test_an_error_of_reading_comes_after_the_results_of_earlier_blocks(two_cores, before):
    def blocks():
        yield from range(before)
        raise DataError("rows.jsonl:9", "cannot be read", "correct it")

    results = parallel_map(where, blocks())
    assert [block for block, _ in islice(results, before)] == list(range(before))
    with pytest.raises(DataError, match="cannot be read"):
        next(results)


def test_a_process_that_is_killed_is_an_error_not_a_hang(two_cores):
    with pytest.raises(RunEnvironmentError, match="a worker process was killed"):
        list(parallel_map(where, [*range(5), "end", *range(5)]))


def test_torch_has_one_thread_in_a_worker(two_cores):
    """A user reader may use torch; its thread pool does not survive the fork, so more threads could wait forever."""
    import torch

    def with_torch(block):
        return torch.get_num_threads(), float(torch.ones(1_000_000).mul(2).sum())

    assert with_torch(0)[1] == 2_000_000, "which starts the threads of this process"
    assert set(parallel_map(with_torch, range(MANY))) == {(1, 2_000_000.0)}


def test_only_few_blocks_are_in_memory(two_cores):
    given = []

    def endless():
        for i in range(10_000):
            given.append(i)
            yield i

    results = parallel_map(where, endless())
    next(results)
    assert len(given) <= MIN_PARALLEL_BLOCKS + 2 * workers.BLOCKS_AHEAD_PER_PROCESS
    results.close()


@pytest.fixture
def many(write_rows, monkeypatch):
    """A file of several blocks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    rows = [{"prompt": f"Domanda {i}?", "response": f"Risposta {i}. " * (i % 5 + 1)} for i in range(300)]
    return write_rows(rows)


def test_one_process_and_several_make_the_same(sft, many, monkeypatch, tmp_path):
    made = []
    for cores in (1, 2):
        monkeypatch.setattr(workers, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("NESSO_TUNE_CACHE", str(tmp_path / f"cache-{cores}"))
        data = prepare_data(sft(many))
        made.append(([row["input_ids"] for row in data.train], data.summary))
    assert made[0] == made[1]
    places = data.train.documents
    assert [places.location(i) for i in (0, 299)] == [f"{many}:1", f"{many}:300"]


def test_a_fault_deep_in_a_file_names_its_line(sft, many, two_cores, tmp_path):
    lines = Path(many).read_text().splitlines()
    lines[250] = lines[250][:-3]
    Path(many).write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"rows.jsonl:251: is not JSON"):
        prepare_data(sft(many))
    assert not list((tmp_path / "cache").rglob("done.json"))


def test_a_killed_preparation_takes_its_processes_along(base, tmp_path):
    """And its lock: the same command works at once, and trusts nothing of what was begun."""
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Perché?"}, {"role": "assistant", "content": "Perché sì. " * 40}]}
    rows.write_text((json.dumps(row) + "\n") * 30_000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}/run\nmethod: sft\nmodel: {{base: {base}}}\n"
        f"data: {{sequence_len: 1024, sources: [{{path: {rows}}}]}}\n"
    )
    command = [sys.executable, "-m", "nesso_tune", "prepare", str(recipe), "--json"]
    environment = {**os.environ, "NESSO_TUNE_CACHE": str(tmp_path / "cache")}
    begun = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    limit = time.monotonic() + 120
    while not children and time.monotonic() < limit:
        children = psutil.Process(begun.pid).children()
        time.sleep(0.01)
    begun.kill()
    begun.wait()
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not list((tmp_path / "cache").rglob("done.json"))
    rows.write_text((json.dumps(row) + "\n") * 20)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert json.loads(again.stdout)["rows_kept"] == 20
    assert not list((tmp_path / "cache").rglob("*.partial"))


HEAD = """
import sys, time
from nesso_tune.data.workers import prepare_in_background
from nesso_tune.data.prepare import prepare_data
from nesso_tune.recipes import load_recipe
recipe = load_recipe(sys.argv[1])
"""
FOUND = """
with prepare_in_background(prepare_data, recipe):
    assert prepare_data(recipe).summary.cache_hit, "made by the other process"
assert "torch" not in sys.modules
"""
OTHER = """
other = load_recipe(sys.argv[1], overrides={"data.sequence_len": 64})
with prepare_in_background(prepare_data, recipe):
    assert not prepare_data(other).summary.cache_hit, "another recipe does not wait"
"""
GIVEN_UP = """
def slow(recipe):
    time.sleep(600)
began = time.monotonic()
try:
    with prepare_in_background(slow, recipe):
        raise ValueError
except ValueError:
    pass
assert time.monotonic() - began < 60
"""
KILLED = """
import os
def dying(recipe):
    os._exit(9)
with prepare_in_background(dying, recipe):
    assert not prepare_data(recipe).summary.cache_hit, "then it is done here"
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
    done = fresh_command("train", file)
    assert done.returncode == 3
    assert done.stderr.count(f"{source}:31") == 1
    assert "Traceback" not in done.stderr


def test_a_killed_parent_takes_it_along(tmp_path):
    import psutil

    file = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [sums(tmp_path)]))
    body = "def slow(recipe):\n    time.sleep(600)\nwith prepare_in_background(slow, recipe):\n    time.sleep(600)\n"
    parent = subprocess.Popen([sys.executable, "-c", HEAD + body, file])
    deadline = time.monotonic() + 120
    while not (children := psutil.Process(parent.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (child,) = children
    child.wait(timeout=60)


def test_files_that_another_process_has_hashed_are_read_again_only_if_they_changed(tmp_path, monkeypatch):
    file = tmp_path / "r\udcffows.jsonl"  # a name that is no UTF-8
    file.write_text("a")
    first, known = content_hash([file]), ReadFiles.of_this_process().to_json()
    read, digest = [], hashlib.file_digest
    for name in ("_hashed", "_trusted"):
        monkeypatch.setattr(files, name, {})
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, kind: read.append(stream.name) or digest(stream, kind))
    ReadFiles.from_json(known).trust()
    assert content_hash([file]) == first
    assert not read
    times = file.stat()
    file.write_text("b")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_hash([file]) != first
    assert len(read) == 1
