"""The command line in processes that start in milliseconds, one alone or several as under a launcher.

Loading torch, transformers and TRL takes eight CPU seconds, more than most runs of the tests. One server per test
process (the fork server of `multiprocessing`) loads them once and forks for every run. From there a run is a real
process with its own environment, output files and signals. Tests of the start itself (imports, launchers, environment
variables that are read at import) use `fresh_command`, which starts a new interpreter.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIBRARIES = ["nesso_tune.cli.main", "nesso_tune.cli.train", "nesso_tune.run", "nesso_tune.smoke", "peft",
             "nesso_tune.generation.inference", "transformers.models.llama.modeling_llama"]  # fmt: skip
_started = weakref.WeakSet()
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


class Forked:
    """A run of the command line, with the interface of `subprocess.Popen`."""

    def __init__(self, *arguments, module="nesso_tune", cwd=ROOT, output=None, **environment):
        self.output = Path(output or tempfile.mkdtemp())
        self.output.mkdir(exist_ok=True)
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        variables = {**os.environ, **fixed, **environment}
        words = [str(argument) for argument in arguments]
        if words[:1] == ["train"] and "--verify" not in words:  # tests/export/test_verify.py and the quickstart do
            words[1:1] = ["--verify", "none"]
        self._process = server.Process(target=_run, args=(module, words, str(cwd), variables, str(self.output)))
        self._process.start()
        self.pid = self._process.pid
        _started.add(self)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=300):
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self):
        return (self.output / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self):
        return (self.output / "stderr").read_text(encoding="utf-8", errors="replace")


class Ranks:
    """Several processes of one run, started as a launcher starts them: the first that fails ends the others."""

    def __init__(self, *arguments, module="tests.support.fsdp_on_cpu", processes=2, own=None, **environment):
        output = Path(tempfile.mkdtemp())
        told = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": _free_port(), "CUDA_VISIBLE_DEVICES": "", **environment}  # fmt: skip
        self.ranks = []
        for rank in range(processes):
            variables = {**told, "RANK": rank, "LOCAL_RANK": rank, **(own[rank] if own else {})}
            variables = {name: str(value) for name, value in variables.items()}
            self.ranks.append(Forked(*arguments, module=module, output=output / f"rank-{rank}", **variables))

    @property
    def pids(self):
        return [rank.pid for rank in self.ranks]

    def poll(self):
        """None while all run or end well; once one fails, the others get SIGTERM, as torchrun does."""
        codes = [rank.poll() for rank in self.ranks]
        if any(codes):
            for rank in self.ranks:
                rank.terminate()
            for rank in self.ranks:
                rank.wait(60)
            return 1
        return 0 if codes == [0] * len(codes) else None

    def wait(self, timeout=300):
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                for rank in self.ranks:
                    rank.kill()
                raise subprocess.TimeoutExpired(str(self.pids), timeout)
            time.sleep(0.01)
        return code

    @property
    def stdout(self):
        return "".join(rank.stdout for rank in self.ranks)

    @property
    def stderr(self):
        return "".join(rank.stderr for rank in self.ranks)


def end_all():
    """Kills what a test has left running."""
    for process in list(_started):
        process.kill()


def completed(process, timeout=300):
    """Waits; what `subprocess.run` would return."""
    code = process.wait(timeout)
    return subprocess.CompletedProcess([], code, process.stdout, process.stderr)


def command(*arguments, **options):
    """Runs the command line in a process of its own."""
    return completed(Forked(*arguments, **options))


def several(*arguments, **options):
    """Runs the command line on two CPU processes, or on another number of them."""
    return completed(Ranks(*arguments, **options))


def _run(module, arguments, cwd, variables, output):
    """In the forked process: everything that a new process would have got from whoever started it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
