"""Start-up of the command line, in multiples of an empty Python process. Run by hand on a quiet machine:

    python -m tests.benchmarks.startup [--repeats 10]

Prints user + system CPU seconds (median of the repeats) of commands and their ratio to `python -c pass`. Bytecode is
cached, as in an installed package, whatever `PYTHONDONTWRITEBYTECODE` says.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile

from tests.support.runs import ROOT

LIMITS = {"--help": 10, "check quickstart/sft": 40}  # times `python -c pass`


def cpu_seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """User + system CPU seconds of one Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures the commands in turn and prints a line for each."""
    parser = argparse.ArgumentParser(description="Start-up times of the command line")
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    commands = {"python -c pass": ["-c", "pass"]}
    commands |= {f"nesso-tune {verb}": ["-m", "nesso_tune", *verb.split()] for verb in LIMITS}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for i in range(repeats + 1):  # the first round fills the caches
            for name, arguments in commands.items():
                seconds = cpu_seconds(arguments, environment)
                if i:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        ratio = seconds / medians["python -c pass"]
        limit = LIMITS.get(name.removeprefix("nesso-tune "))
        print(f"{name:<32}{seconds:>8.3f} s {ratio:>6.1f} x" + (f"  (limit {limit} x)" if limit else ""))


if __name__ == "__main__":
    main()
