"""`nesso-tune doctor`: checks the environment of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nesso_tune.cli.options import file_path
from nesso_tune.errors import Problem, RunEnvironmentError
from nesso_tune.logs import print_lines


def doctor(
    folder: Annotated[
        Path, typer.Option("--output-dir", metavar="FOLDER", parser=file_path, help="Output folder of runs.")
    ] = Path("outputs"),
    timeout: Annotated[int, typer.Option(min=1, help="Seconds to wait for other processes.")] = 60,
) -> None:
    """Check versions, driver, GPUs, disk, cache and ports. A launcher's processes also compare machines and links."""
    from nesso_tune.distributed.process_group import destroy_process_group, is_main_process, world_size
    from nesso_tune.launch.doctor import inspect_machine, measure_communication

    machine = inspect_machine(folder)
    facts, problems = list(machine.facts), list(machine.problems)
    if world_size() > 1:
        machines, measured, shared = measure_communication(machine, timeout)
        facts += measured
        # processes of one machine report the same problem
        own = dict.fromkeys((report.host, problem) for report in machines for problem in report.problems)
        problems = [Problem(f"{host}: {p.where}", p.what, p.remedy) for host, p in own] + shared
    if is_main_process():
        for name, value in facts:
            print_lines(f"{name:<14}{value}")
    destroy_process_group()
    if problems:
        raise RunEnvironmentError(problems)
    if is_main_process():
        print_lines("no problems found")
