"""`accelerate launch` whose endings take one line: `python -m nesso_tune.launch.accelerate launch …`, its arguments.

Machines that do not come are named, a process that was killed too; its exit code is that of the run. What a run says
itself needs no second message, so accelerate's traceback is left out.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
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
from nesso_tune.logs import print_notes

ABOVE = "what a library printed above may say why"
HINTS = {
    "SIGKILL": "if nobody did it, the machine ran out of memory: lower train.micro_batch_size or data.sequence_len",
    "SIGBUS": "shared memory may have run out: `nesso-tune doctor` looks at it",
}


def main(arguments: list[str] | None = None) -> None:
    """Launches, and exits with the code of the run.

    Signals go on to the processes of the run, which save and end; the launcher ends after them. Accelerate works in a
    thread, since in the main one torch's launcher would answer signals itself, and kill what has not saved in 30 s.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = arguments[1:] if arguments[:1] == ["launch"] else arguments  # the one verb of accelerate's that this is
    logging.disable(logging.ERROR)  # of torch's launcher, in this process: what matters is said below
    os.environ[LAUNCHED_VARIABLE] = "1"
    accelerate.default_config_file = os.devnull  # one of the user's that is for something else could only harm
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as the job of Slurm does, which sends to all by itself
            signal.signal(number, _pass_on)
    codes: list[int] = []
    work = Thread(
        target=lambda: codes.append(_launch(accelerate.launch_command_parser().parse_args(arguments))), daemon=True
    )
    work.start()
    while work.is_alive():
        work.join(0.1)  # in between, signals are answered
    sys.exit(codes[0] if codes else 1)


def _launch(wanted: Namespace) -> int:
    """Runs accelerate's launcher; returns the exit code of the run."""
    try:
        store = _machines_come(wanted)  # kept: others may still be looking into it
        accelerate.launch_command(wanted)
        del store
    except ChildFailedError as error:
        return _code(error)
    except CalledProcessError as error:  # how accelerate says that its only process failed
        return int(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except dist.DistError as error:
        what = f"the machines do not find each other ({first_line(error)})"
        remedy = "see whether each part was started, and whether a firewall stands between"
        print_notes(str(RunEnvironmentError(socket.gethostname(), what, remedy)))
        return RunEnvironmentError.exit_code
    except RunEnvironmentError as error:
        print_notes(*map(str, error.problems))
        return error.exit_code
    return 0


def _pass_on(number: int, _: FrameType | None) -> None:
    """Sends a signal on to the processes of the run; before there are any, ends."""
    processes = psutil.Process().children()
    if not processes:
        os._exit(128 + number)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _machines_come(wanted: Namespace) -> dist.Store | None:
    """Waits, beside the port that accelerate will want, until every machine has come.

    Raises:
        RunEnvironmentError: naming those that have not within the time.
    """
    number = int(wanted.num_machines or 1)
    if number == 1 or not wanted.main_process_ip:
        return None
    rank, port = int(wanted.machine_rank), int(wanted.main_process_port) + 1
    timeout_s = int(dict(pair.split("=") for pair in wanted.rdzv_conf.split(",") if pair).get("timeout", 1800))
    store = connect_store(wanted.main_process_ip, port, rank, number, timeout_s, is_master=rank == 0)
    store.set(f"machine/{rank}", "")
    missing = missing_ranks(store, "machine", number, timeout_s)
    if missing:
        nodes = slurm_node_names()
        raise did_not_join([node_name(i, nodes) for i in missing], timeout_s)
    return store


def _code(error: ChildFailedError) -> int:
    """The exit code of a failed run: that of a process that ended by itself, if one did."""
    codes = {rank: int(failure.exitcode) for rank, failure in sorted(error.failures.items())}
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:  # with that one the launcher ends those that are left
            name = signal.Signals(-code).name
            problem = Problem(f"rank {rank} on {socket.gethostname()}", f"was killed ({name})", HINTS.get(name, ABOVE))
            print_notes(str(problem))
    own = [code for code in codes.values() if code > 0]
    if Preempted.exit_code in own:  # others may have lost the one that was asked to stop
        return Preempted.exit_code
    killed = [-code for code in codes.values() if code < 0]
    return own[0] if own else 128 + next((number for number in killed if number != signal.SIGTERM), killed[0])


if __name__ == "__main__":
    main()
