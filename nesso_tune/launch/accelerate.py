"""`accelerate launch` with one-line errors: `python -m nesso_tune.launch.accelerate launch …` takes its arguments.

Names machines that did not join and processes that were killed, and exits with the code of the run. The tracebacks of
accelerate and torch's launcher are suppressed, since the run prints its own errors.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from subprocess import CalledProcessError
from threading import Thread
from types import FrameType

import psutil
from accelerate.commands import launch as accelerate
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nesso_tune.distributed.membership import connect_store, did_not_join, missing_ranks, node_name, slurm_node_names
from nesso_tune.distributed.preemption import LAUNCHED_VARIABLE
from nesso_tune.errors import Preempted, Problem, RunEnvironmentError, first_line
from nesso_tune.logs import print_to_stderr

DEFAULT_HINT = "see the output of libraries above"
HINTS = {
    "SIGKILL": "unless a user did it, the machine ran out of memory: lower train.micro_batch_size or data.sequence_len",
    "SIGBUS": "shared memory may be full: `nesso-tune doctor` checks it",
}


def main(arguments: list[str] | None = None) -> None:
    """Launches the run and exits with its exit code.

    Signals are forwarded to the processes of the run, which save and exit; the launcher exits after them. Accelerate
    runs in a thread: in the main thread torch's launcher installs its own handlers, and kills processes after 30 s.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = arguments[1:] if arguments[:1] == ["launch"] else arguments  # the only supported command of accelerate
    logging.disable(logging.ERROR)  # of torch's launcher, in this process; errors are printed below
    os.environ[LAUNCHED_VARIABLE] = os.path.join(tempfile.mkdtemp(prefix="nesso-tune-"), "forwarded")
    accelerate.default_config_file = os.devnull  # ignore the user's configuration file
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # Slurm jobs ignore USR1: Slurm sends it to all processes
            signal.signal(number, _forward)
    codes: list[int] = []
    launcher = Thread(
        target=lambda: codes.append(_launch(accelerate.launch_command_parser().parse_args(arguments))), daemon=True
    )
    launcher.start()
    while launcher.is_alive():
        launcher.join(0.1)  # signal handlers run between the joins
    shutil.rmtree(os.path.dirname(os.environ[LAUNCHED_VARIABLE]), ignore_errors=True)
    sys.exit(codes[0] if codes else 1)


def _launch(arguments: Namespace) -> int:
    """Runs accelerate's launcher; returns the exit code of the run."""
    try:
        store = _wait_for_machines(arguments)  # keep it alive: other machines may still read it
        accelerate.launch_command(arguments)
        del store
    except ChildFailedError as error:
        return _code(error)
    except CalledProcessError as error:  # accelerate raises it if a single process failed
        return int(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except dist.DistError as error:
        what = f"the machines cannot connect to each other ({first_line(error)})"
        remedy = "check that the launcher runs on each machine, and that no firewall blocks the port"
        print_to_stderr(str(RunEnvironmentError(socket.gethostname(), what, remedy)))
        return RunEnvironmentError.exit_code
    except RunEnvironmentError as error:
        print_to_stderr(*map(str, error.problems))
        return error.exit_code
    return 0


def _forward(number: int, _: FrameType | None) -> None:
    """Forwards a signal to the processes of the run; exits if there are none yet."""
    processes = psutil.Process().children()
    if not processes:
        os._exit(128 + number)
    with suppress(OSError):
        open(os.environ[LAUNCHED_VARIABLE], "w").close()  # before the signal, whose handler looks for it
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _wait_for_machines(arguments: Namespace) -> dist.Store | None:
    """Waits until every machine joined, on the port after the one that accelerate uses.

    Raises:
        RunEnvironmentError: naming the machines that did not join within the timeout.
    """
    num_machines = int(arguments.num_machines or 1)
    if num_machines == 1 or not arguments.main_process_ip:
        return None
    rank, port = int(arguments.machine_rank), int(arguments.main_process_port) + 1
    timeout_s = int(dict(pair.split("=") for pair in arguments.rdzv_conf.split(",") if pair).get("timeout", 1800))
    store = connect_store(arguments.main_process_ip, port, rank, num_machines, timeout_s, is_master=rank == 0)
    store.set(f"machine/{rank}", "")
    missing = missing_ranks(store, "machine", num_machines, timeout_s)
    if missing:
        nodes = slurm_node_names()
        raise did_not_join([node_name(i, nodes) for i in missing], timeout_s)
    return store


def _code(error: ChildFailedError) -> int:
    """The exit code of a failed run: of the first process that exited, else 128 + the signal that killed one."""
    ended = sorted(error.failures.items(), key=lambda item: item[1].timestamp)  # ties are in torch's order of ends
    codes = {rank: int(failure.exitcode) for rank, failure in ended}
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:  # the launcher terminates the remaining processes with it
            name = signal.Signals(-code).name
            problem = Problem(
                f"rank {rank} on {socket.gethostname()}", f"was killed ({name})", HINTS.get(name, DEFAULT_HINT)
            )
            print_to_stderr(str(problem))
    exited = [code for code in codes.values() if code > 0 and code != 128 + signal.SIGTERM]
    if Preempted.exit_code in exited:  # the others may have lost contact with a preempted process
        return Preempted.exit_code
    killed = [-code for code in codes.values() if code < 0 and code != -signal.SIGTERM]
    return exited[0] if exited else 128 + (killed[0] if killed else signal.SIGTERM)


if __name__ == "__main__":
    main()
