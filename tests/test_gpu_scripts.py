"""The benchmark for GPUs runs on a CPU too, in small: every case has figures, and both sides the same losses."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

SCRIPTS = ROOT / "scripts"
# Compiling is left to test_compile.py, which does the same in less time; the second of TRL's ways to a run by hand.
SKIPPED = (
    ["compiled"]
    if "NESSO_TUNE_ALL" in os.environ
    else ["compiled", "rows apart", "precomputed reference", "checkpointing"]
)
ALL = {
    "sft": {"ours", "TRL", "TRL, rows apart", "ours, checkpointing"},
    "dpo": {"ours", "TRL", "ours, cached reference", "TRL, precomputed reference"},
}
CASES = {what: {name for name in names if name.split(", ")[-1] not in SKIPPED} for what, names in ALL.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `gpu_benchmark.py --toy` writes."""
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(SCRIPTS / "gpu_benchmark.py"), str(out), "--toy"]
    command += [word for trait in SKIPPED for word in ("--skip", trait)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip() == (out / "table.md").read_text().rstrip()
    return out


@pytest.fixture(scope="module")
def lines(folder):
    return [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]


def cases(lines, method):
    return {", ".join([line["side"], *line["traits"]]): line for line in lines if line["what"] == method}


@pytest.mark.parametrize("method", CASES)
def test_every_case_has_figures(lines, method):
    found = cases(lines, method)
    assert set(found) == CASES[method]
    assert not [line["error"] for line in found.values() if "error" in line]
    for line in found.values():
        assert len(line["losses"]) == 3
        assert min(line[key] for key in ("step_s", "rows_per_s", "tokens_per_s", "teraflops", "peak_memory_gb")) > 0
        assert line["supervised_tokens_per_s"] < line["tokens_per_s"]
        assert line["attention"]


@pytest.mark.parametrize("method", CASES)
def test_both_sides_begin_with_the_same_loss_and_follow_each_other(lines, method):
    found = cases(lines, method)
    for line in found.values():
        if method == "dpo":
            assert line["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
        assert line["losses"] == pytest.approx(found["TRL"]["losses"], rel=1e-3), "the same rows in the same order"


def test_the_reference_is_computed_once(lines):
    found = cases(lines, "dpo")
    assert found["TRL"]["reference_s"] is None, "its reference runs along in every step"
    assert 0 < found["ours, cached reference"]["reference_s"] < found["ours"]["reference_s"]


def test_the_look_finds_no_more_than_rounding(lines):
    (look,) = [line for line in lines if line["what"] == "look"]
    for side in ("ours", "ours, bfloat16 weights", "TRL"):
        assert look[side]["loss"] < 1e-3
        assert look[side]["gradient"] < 5e-2
        assert look[side]["hidden"] < 5e-2, "a leak between documents makes about 1"
        assert look[side]["answers"] < 5e-3
    assert look["ours"]["attention"].startswith("sdpa by run"), "what was called, and there is no GPU"


def test_the_table_is_whole(folder):
    text = (folder / "table.md").read_text()
    for part in text.split("\n\n"):
        rows = [line for line in part.splitlines() if line.startswith("|")]
        assert len({row.count(" | ") for row in rows}) <= 1
        assert not rows or set(rows[1]) <= set("| -")
    for names in CASES.values():
        assert all(f"\n| {name} | " in text for name in names)


def test_a_case_that_fails_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_benchmark

    facts = {"gpu": "a | b", "peak": 1e15, "versions": {"torch": "1"}, "parameters": 1, "flash_attn": True}
    rows = {"rows": 1, "tokens": 2, "supervised_tokens": 1, "operations": 1e12}
    monkeypatch.setattr(gpu_benchmark, "set_up", lambda *_: facts | {m: [rows] * 20 for m in ("sft", "dpo")})

    def child(what, *_):
        raise gpu_benchmark.Failed(f"out of memory | in {what}")

    def ours(case, size, *_):
        count = size.steps[case.method]
        return {"seconds": list(range(count)), "losses": [1.0] * count, "peak_memory_gb": 1.0, "attention": "flash"}

    monkeypatch.setattr(gpu_benchmark, "child", child)
    monkeypatch.setattr(gpu_benchmark, "ours", ours)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(sys, "argv", ["gpu_benchmark.py", str(tmp_path), "--rounds", "2"])
    gpu_benchmark.main()
    found = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    failed = [line for line in found if "error" in line]
    assert {line.get("side") for line in failed} == {None, "TRL"}
    assert len([line for line in found if line.get("side") == "ours"]) == 2 * 6
    table = capsys.readouterr().out
    assert "| TRL | failed: out of memory / in trl |" in table
    assert "| ours, checkpointing | flash | 1.000 | 1.000 | 2 | 1 | 1.00 | 0.1% | 1.00 | 1.00000 |  |" in table
    assert "flex" not in table, "flash-attn is there, so TRL needs no other kernel"
