"""`nesso-tune doctor`: looks at the environment before a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import file_path
from nesso_tune.errors import Problem, RunEnvironmentError
from nesso_tune.logs import print_lines


def doctor(
    folder: Annotated[
        Path, typer.Option("--output-dir", metavar="FOLDER", parser=file_path, help="Where runs will be written.")
    ] = Path("outputs"),
    timeout: Annotated[int, typer.Option(min=1, help="Seconds to wait for other processes.")] = 60,
) -> None:
    """Check versions, driver, GPUs, disk, cache and ports; under a launcher, all machines and how they talk."""
    from nesso_tune.distributed.process_group import destroy_process_group, is_main_process, world_size
    from nesso_tune.launch.doctor import examine, meet

    machine = examine(folder)
    facts, problems = list(machine.facts), list(machine.problems)
    if world_size() > 1:
        machines, met, found = meet(machine, timeout)
        facts += met
        # What every process of a machine finds is one fault of that machine.
        every = dict.fromkeys((one.host, problem) for one in machines for problem in one.problems)
        problems = [Problem(f"{host}: {p.where}", p.what, p.remedy) for host, p in every] + found
    if is_main_process():
        for name, value in facts:
            print_lines(f"{name:<14}{value}")
    destroy_process_group()
    if problems:
        raise RunEnvironmentError(problems)
    if is_main_process():
        print_lines("nothing is wrong here")
