"""doctor, on this machine and under launchers: real processes, real sockets."""

import os
import socket
import subprocess
import sys

import pytest

from nesso_tune.errors import Problem
from nesso_tune.launch import doctor as checks
from nesso_tune.launch.doctor import MachineReport, find_differences, inspect_machine, slow_links
from tests.support.runs import ROOT, lonely, main_here

ALONE = [sys.executable, "-m", "nesso_tune", "doctor"]


def doctor(*words, command=ALONE, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
                   **variables}  # fmt: skip
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False
    )


@pytest.fixture
def without_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_this_machine_is_fit_for_a_run(capsys, without_gpus):
    code, out, err = main_here(capsys, "doctor")
    assert code == 0, err
    assert out.endswith("no problems found\n")
    for word in ("torch", "driver", "GPUs", "attention", "runs", "hub cache", "port"):
        assert f"\n{word} " in out


def test_a_package_of_another_version_is_named_with_the_command(tmp_path, capsys, without_gpus, monkeypatch):
    (folder := tmp_path / "trl-0.0.1.dist-info").mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = main_here(capsys, "doctor")
    assert code == 5
    assert err.startswith("trl: is 0.0.1, not trl<")
    assert "pip install 'trl<" in err


def test_a_torch_without_cuda_beside_gpus(tmp_path, capsys, without_gpus, monkeypatch):
    (fake := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.95.05, NVIDIA A100-SXM-64GB'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, out, err = main_here(capsys, "doctor")
    assert "580.95.05" in out
    if checks.torch.version.cuda is None:
        assert code == 5
        assert "is built without CUDA, and there are 1 GPUs" in err


def test_a_full_disk_is_a_problem(tmp_path, monkeypatch):
    assert not [p for p in inspect_machine(tmp_path).problems if "left" in p.what]
    monkeypatch.setattr(checks, "MIN_DISK_BYTES", 1 << 60)
    assert [p.where for p in inspect_machine(tmp_path / "not" / "x").problems if "(runs)" in p.what] == [str(tmp_path)]


def test_the_launchers_port_is_seen(tmp_path, monkeypatch, port):
    monkeypatch.setattr(checks, "DEFAULT_PORT", port)
    assert dict(inspect_machine(tmp_path).facts)["port"] == f"{port} is free"
    with socket.socket() as holder:
        holder.bind(("", port))
        holder.listen()
        assert f"{port} is in use" in dict(inspect_machine(tmp_path).facts)["port"]


def test_two_processes_meet_and_are_timed():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0", "-m", "nesso_tune", "doctor"]  # fmt: skip
    done = doctor(command=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no problems found") == 1, "one voice"
    assert "processes     2 on 1 machine(s)" in done.stdout
    assert "all-reduce    64 MiB in" in done.stdout
    assert "(process 1): " in done.stdout


def test_a_process_that_does_not_come_is_named_in_time(port):
    """As for `train`: see tests/distributed/test_membership.py."""
    done = doctor("--timeout", "3", **lonely(0, port))
    assert done.returncode == 5
    assert "node 1 (rank 1): did not join within 3 s; check that the node is up" in done.stderr


def test_the_machine_that_differs_is_named_once():
    def of(host, torch="2.13.0", gpus=("A100",)):
        return MachineReport(host, {"torch": torch}, gpus, (), ())

    machines = [of("a"), of("a"), of("b", torch="2.12.0"), of("b", torch="2.12.0"), of("c"), of("c", gpus=("H100",))]
    assert find_differences(machines) == [
        Problem("b", "torch is 2.12.0, on the others 2.13.0", "use the same on all machines"),
        Problem("c", "GPUs is H100, on the others A100", "use the same on all machines"),
    ]
    assert find_differences([of("a"), of("b")]) == []


def test_the_slow_link_is_named():
    links = [("b", 20.0), ("c", 21.0), ("d", 3.0)]
    assert [problem.where for problem in slow_links(links)] == ["d"]
    assert slow_links(links[:2]) == slow_links([]) == []
