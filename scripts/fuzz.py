"""Runs the property tests repeatedly with fresh examples for a given time: `make fuzz`.

    python scripts/fuzz.py --minutes 30 --seed 7 tests/data tests/recipes

Each round prints its seed. A failing example is shrunk and printed with the command that reproduces it. The last round
runs to completion. The exit code is 1 if a round failed.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def round_command(seed: int, paths: list[str]) -> list[str]:
    """The pytest command of one round."""
    options = ["-m", "hypothesis", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
    return [sys.executable, "-m", "pytest", *options, "--tb=short", *paths]


def main() -> None:
    """Runs rounds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="duration (default: 30)")
    parser.add_argument(
        "--seed", type=int, default=None, help="seed of the first round; incremented each round (default: random)"
    )
    parser.add_argument(
        "--examples", type=int, default=6, help="multiple of the number of examples in `make test` (default: 6)"
    )
    parser.add_argument("paths", nargs="*", help="test files or folders (default: all)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    os.environ["NESSO_TUNE_EXAMPLES"] = str(options.examples)
    began = time.monotonic()
    end, failed, rounds = began + 60 * options.minutes, [], 0
    while time.monotonic() < end:
        print(f"fuzz: round {rounds + 1}, seed {seed}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        if subprocess.run(round_command(seed, options.paths), cwd=ROOT, check=False).returncode:
            command = " ".join(["python", *round_command(seed, options.paths)[1:]])
            print(f"fuzz: seed {seed} FAILED; reproduce: NESSO_TUNE_EXAMPLES={options.examples} {command}", flush=True)
            failed.append(seed)
        seed, rounds = seed + 1, rounds + 1
    spent = (time.monotonic() - began) / 60
    print(
        f"fuzz: {rounds} rounds, {spent:.1f} minutes, seeds {seed - rounds} to {seed - 1}, failed: {failed or 'none'}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
