"""Property tests with fresh examples, again and again until the time is over: `make fuzz`.

    python scripts/fuzz.py --minutes 30 --seed 7 tests/data tests/recipes

Each round draws other examples, from a seed that is printed; a failure is shrunk and printed with the command that
draws it again. The last round is finished. Ends with 1 if a round failed.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def round_of(seed: int, paths: list[str]) -> list[str]:
    """The command of one round."""
    chosen = ["-m", "hypothesis", "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}"]
    return [sys.executable, "-m", "pytest", *chosen, "--tb=short", *paths]


def main() -> None:
    """Runs rounds until the minutes are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the next one's is one higher")
    parser.add_argument("--examples", type=int, default=6, help="times as many examples as in `make test`")
    parser.add_argument("paths", nargs="*", help="which tests; default: all")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    os.environ["NESSO_TUNE_EXAMPLES"] = str(options.examples)
    began = time.monotonic()
    end, failed, rounds = began + 60 * options.minutes, [], 0
    while time.monotonic() < end:
        print(f"fuzz: round {rounds + 1}, seed {seed}, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        if subprocess.run(round_of(seed, options.paths), cwd=ROOT, check=False).returncode:
            again = " ".join(["python", *round_of(seed, options.paths)[1:]])
            print(f"fuzz: seed {seed} FAILED; again: NESSO_TUNE_EXAMPLES={options.examples} {again}", flush=True)
            failed.append(seed)
        seed, rounds = seed + 1, rounds + 1
    spent = (time.monotonic() - began) / 60
    print(
        f"fuzz: {rounds} rounds, {spent:.1f} minutes, seeds {seed - rounds} to {seed - 1}, failed: {failed or 'none'}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
