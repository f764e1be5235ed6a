"""doctor, on this machine and under launchers: real processes, real sockets."""

import errno
import os
import shutil
import socket
import subprocess
import sys

import pytest

from nesso_tune.launch import doctor as checks
from nesso_tune.launch.command import count_local_gpus
from nesso_tune.launch.doctor import find_driver, gpu_problems, inspect_machine, probe_disk
from tests.support.runs import ROOT, lonely, main_here, thorough

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
    for word in ("torch", "driver", "GPUs", "attention", "runs", "data cache", "hub cache", "HF_HOME", "port"):
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
    assert "processes         2 on 1 machine(s)" in done.stdout
    assert "all-reduce        64 MiB in" in done.stdout
    assert "(process 1): " in done.stdout


@thorough  # as tests/distributed/test_membership.py for a run
def test_a_process_that_does_not_come_is_named_in_time(port):
    """As for `train`: see tests/distributed/test_membership.py."""
    done = doctor("--timeout", "3", **lonely(0, port))
    assert done.returncode == 5
    assert "node 1 (rank 1): did not join within 3 s; check that the node is up" in done.stderr


def test_disks_are_written_and_what_fails_is_named(tmp_path, monkeypatch):
    disk = probe_disk("runs", tmp_path)
    assert (disk.label, disk.locks, [*tmp_path.iterdir()]) == ("runs", True, [])
    assert disk.write_rate > 0 < disk.latency_s
    assert 0 < disk.free <= shutil.disk_usage(tmp_path).total
    problem = probe_disk("runs", tmp_path / "none")
    assert (problem.where, problem.what) == (f"{tmp_path}/none", "cannot be written (runs: no such file or directory)")

    def refuse(lock, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checks.FileLock, "acquire", refuse)
    found = [p.what for p in inspect_machine(tmp_path).problems if p.where == str(tmp_path)]
    assert "does not support file locks (runs)" in found


def test_amd_gpus_are_found_without_torch(tmp_path, monkeypatch, without_gpus):
    for i, units in enumerate((0, 416, 416)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "properties").write_text(f"cpu_cores_count 64\nsimd_count {units}\nvendor_id 4098\n")
    monkeypatch.setattr("nesso_tune.launch.command.AMD_NODES", tmp_path)
    monkeypatch.setattr("nesso_tune.launch.command.DRIVER_GPUS", tmp_path / "no")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert count_local_gpus() == 0, "CUDA_VISIBLE_DEVICES hides AMD's GPUs too"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert count_local_gpus() == 2
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    assert count_local_gpus() == 1
    (version := tmp_path / "version").write_text("6.8.5\n")
    monkeypatch.setattr(checks, "AMD_DRIVER", version)
    driver = find_driver()
    assert (driver.version, len(driver.gpus), driver.amd) == ("6.8.5", 2, True)
    monkeypatch.setattr(checks.torch.version, "hip", None)
    assert [p.what for p in gpu_problems((), driver)] == [
        f"{checks.torch.__version__} is built without ROCm, and there are 2 GPUs"
    ]
    monkeypatch.setattr(checks.torch.version, "hip", "6.4")
    monkeypatch.setattr(checks, "AMD_DEVICE", tmp_path / "kfd")
    assert [p.what for p in gpu_problems((), driver)] == ["cannot be opened by this user"]
    (tmp_path / "kfd").touch()
    assert [p.what for p in gpu_problems((), driver)] == ["6.8.5 does not support ROCm 6.4 of torch"]
