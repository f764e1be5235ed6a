"""The scripts for GPUs: their toy versions on a CPU, their set-up, and the limits of their size."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.runs import ROOT, thorough

SCRIPTS = ROOT / "scripts"
LINES = {"gpu_smoke.py": 120, "gpu_benchmark.py": 250, "gpu_wheels.py": 250, "gpu_workload.py": 250}
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def scripts(monkeypatch):
    """Makes the scripts importable."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env={**CPU, **environment}, timeout=900
    )


def test_there_is_one_script_for_each_purpose():
    assert {file.name for file in SCRIPTS.glob("gpu_*.py")} == set(LINES)
    for name, limit in LINES.items():
        assert len((SCRIPTS / name).read_text().splitlines()) <= limit


@thorough
def test_the_smoke_script_kills_and_resumes_a_run():
    done = run(SCRIPTS / "gpu_smoke.py", "--toy", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    line, summary = done.stdout.splitlines()
    assert line.startswith("bfloat16: OK (sdpa, by document; loss 8.")
    assert line.endswith("largest difference after kill and resume 0.0)")
    assert summary.startswith("1 of 1 OK in ")


def test_the_smoke_script_says_what_failed_and_exits_with_1(scripts, monkeypatch, capsys, tmp_path):
    import gpu_smoke

    def train(command, log, *_):
        if "nesso_tune" in command:
            raise gpu_smoke.Failed(f"no memory for {log.stem}")
        return json.dumps({"gpu": None, "torch": "1", "bitsandbytes": False})

    monkeypatch.setattr(gpu_smoke, "run", train)
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--toy"])
    with pytest.raises(SystemExit) as exited:
        gpu_smoke.main()
    assert exited.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["sft", "dpo", "lora", "bfloat16", "flash", "qlora"]
    assert "FAILED: Failed('no memory for dpo-whole')" in lines[1]
    assert lines[-2] == "qlora: not run: bitsandbytes is not installed"
    assert lines[-1].startswith("0 of 5 OK")


@thorough
def test_the_benchmark_measures_both_sides(tmp_path):
    done = run(SCRIPTS / "gpu_benchmark.py", tmp_path, "--toy", "--minutes", 15, "--only", "DPO")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    table = (tmp_path / "table.md").read_text()
    assert done.stdout.rstrip() == table.rstrip()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| DPO")]
    assert [row[0] for row in rows] == [
        "DPO, TRL, micro batch 8, precomputed reference",
        "DPO, TRL, micro batch 8",
        "DPO, nesso-tune, micro batch 8",
    ]
    assert {row[6] for row in rows} == {"0.6931"}, "both sides start with the loss ln 2"
    for row in rows:
        assert float(row[1]) > 0
        needed, common = (float(cell.removesuffix(" TFLOP/s")) for cell in row[3:5])
        assert 0 < needed < common, "the common count has the prompt twice and the head on every token"


@pytest.mark.parametrize(("minutes", "auto"), [(9.5, True), (9.5, False), (0, True)])
def test_the_benchmark_leaves_out_what_has_no_time_and_goes_on_after_a_failure(
    scripts, monkeypatch, capsys, tmp_path, minutes, auto
):
    import gpu_benchmark

    work = [[100, 1e12, 2e12]] * 15
    facts = {"machine": "X", "peak": 1e14, "auto": auto, "work": {"sft": work, "dpo": work}}
    lines = [{"step": step, "seconds": step * 0.1, "loss": 0.5} for step in (1, 5, 10, 15)]

    def child(command, *_):
        if "trl" in command:
            raise gpu_benchmark.Failed("out of memory | in TRL")
        return "a warning\n" + json.dumps(facts)

    def ours(case, *_):
        if "profile" in case.variant:
            return {"profile": f"profile of {case}"}
        return {"lines": lines, "memory": 1.5, "attention": "flash", "micro": 16}

    monkeypatch.setattr(gpu_benchmark.given, "run", child)
    monkeypatch.setattr(gpu_benchmark, "ours", ours)
    monkeypatch.setattr(gpu_benchmark, "environment", lambda *_: {})
    monkeypatch.setattr(gpu_benchmark.given, "write_data", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_benchmark.py", str(tmp_path), "--minutes", str(minutes)])
    with pytest.raises(SystemExit) as exited:
        gpu_benchmark.main()
    table = capsys.readouterr().out
    assert exited.value.code == (minutes > 0)
    if not minutes:
        assert table.count("Left out: ") == len(gpu_benchmark.CASES)
        assert "Left out: DPO, nesso-tune, micro batch 8: no time" in table
        return
    assert "| DPO, nesso-tune, micro batch 8 | 0.100 | 1,000 | 10.0% | 20.0% | 1.5 | 0.5000 | flash |  |" in table
    assert "| SFT, TRL, micro batch 8, rows apart | failed: out of memory / in TRL |" in table
    assert "profile of SFT, nesso-tune, micro batch 8, compiled, profile" in table
    if auto:
        assert "| SFT, nesso-tune, micro batch auto, compiled (16) | 0.100 |" in table
    assert ("Left out: SFT, nesso-tune, micro batch auto: this version has no" in table) is not auto


def test_the_wheels_are_unpacked_before_an_existing_path(scripts, monkeypatch, tmp_path):
    from gpu_wheels import environment

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "ANSWER = 42\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text("OWN = 1\n")
    settings = environment(tmp_path, wheels)
    code = (
        "import carried, own, nesso_tune; from importlib.metadata import version, requires; "
        "print(carried.ANSWER, own.OWN, nesso_tune.__file__, version('nesso-tune'), len(requires('nesso-tune')) > 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert done.stdout.split() == ["42", "1", str(ROOT / "nesso_tune" / "__init__.py"), "0.1.0", "True"], done.stderr
    with pytest.raises(SystemExit, match="has no wheels; run"):
        environment(tmp_path, tmp_path / "mine")


def test_what_the_gpu_machine_has_is_not_collected(scripts, monkeypatch, tmp_path):
    import gpu_wheels

    def package(name, *needs):
        return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(needs)}}

    found = [
        package("torch", "sympy>=1", "cuda-toolkit[cufft]", "optree; extra == 'optree'"),
        package("sympy", "mpmath<2"), package("mpmath"), package("cuda_toolkit"), package("nvidia-cufft"),
        package("optree"), package("TRL", "torch>=2"),
    ]  # fmt: skip

    def pip(*words):
        report = next(word for word in words if word.startswith("--report=")).removeprefix("--report=")
        constraints = (tmp_path / "constraints.txt").read_text()
        assert "torch==" not in constraints
        assert "transformers==" in constraints
        Path(report).write_text(json.dumps({"install": found}))

    monkeypatch.setattr(gpu_wheels, "pip", pip)
    assert gpu_wheels.resolve(["TRL", "torch==2.11.0"], ("torch",), tmp_path) == ["optree==1.0", "TRL==1.0"]


def test_bitsandbytes_keeps_the_library_of_one_cuda_release(scripts, tmp_path):
    from gpu_wheels import slim

    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cuda118", "cuda130", "cpu", "rocm70")]
    wheel = tmp_path / "bitsandbytes-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("bitsandbytes/__init__.py", *names):
            archive.writestr(name, name)
    slim(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == ["bitsandbytes/__init__.py", names[1], names[2]]
