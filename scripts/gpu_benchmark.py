"""Training on one GPU beside TRL, on the same rows, in turn: speed, memory, and whether the numbers are right.

    python scripts/gpu_benchmark.py [FOLDER] [--toy] [--only sft|dpo|look] [--skip WORD]
        [--sft-steps N] [--dpo-steps N] [--rounds N]

Zagreus's shape with random weights, SFT packed to 4096 and DPO within 1024 tokens, bfloat16 over float32 weights; needs
no network. FOLDER/figures.jsonl gets a line a measurement, at once; FOLDER/table.md is written anew after each, so that
a run that is cut off leaves what it has. `--toy` takes the same way in small, on a CPU too. docs/benchmarks.md says
what is compared.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_benchmark_table import table
from gpu_benchmark_cases import CASES, METHODS, NOT_IN_TOY, ROOT, TOY, ZAGREUS, Case, Size, write_data, write_recipe

LIMIT = 240  # seconds for a case
Figures = dict[str, Any]


class Failed(Exception):
    """A case that did not run to its end; the message is the last line it said."""


def environment(work: Path, toy: bool) -> dict[str, str]:
    """One GPU, no hub, a cache of its own; both sides get the same."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    fixed = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
             "NESSO_TUNE_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets"),
             "CUDA_VISIBLE_DEVICES": visible}  # fmt: skip
    return {**os.environ, **fixed, **({"OMP_NUM_THREADS": "1"} if toy else {})}


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


def child(what: str, work: Path, settings: dict[str, str], case: Case | None = None) -> Figures:
    """What gpu_benchmark_child.py answers.

    Raises:
        Failed: if it does not.
    """
    log = work / "log"
    command = [sys.executable, str(Path(__file__).with_name("gpu_benchmark_child.py")), what, str(work)]
    command += [json.dumps(asdict(case))] if case else []
    with log.open("w") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=settings, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"it took more than {LIMIT} s") from None
    if done.returncode:
        raise Failed(last_line(log))
    answer: Figures = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours(case: Case, size: Size, work: Path, settings: dict[str, str]) -> Figures:
    """A run of ours, by its metrics.jsonl; it is ended after the last step, before it writes the model.

    Raises:
        Failed: if it ends before.
    """
    run, log, began = work / "run", work / "log", time.monotonic()
    shutil.rmtree(run, ignore_errors=True)
    if case.method == "dpo" and "cached reference" not in case.traits:
        shutil.rmtree(work / "cache" / "reference", ignore_errors=True)
    command = [sys.executable, "-m", "nesso_tune", "train", str(write_recipe(case, size, work))]
    with log.open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=settings, cwd=ROOT)
        try:
            while len(steps := logged(run)) < size.steps[case.method]:
                if process.poll() is not None:
                    raise Failed(last_line(log))
                if time.monotonic() - began > LIMIT:
                    raise Failed(f"it took more than {LIMIT} s")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    reference = [line["seconds"] for line in metrics(run) if line.get("event") == "reference"]
    return {
        "seconds": [line["seconds"] - sum(reference) for line in steps],
        "losses": [line["loss"] for line in steps],
        "peak_memory_gb": steps[-1]["peak_memory_gb"],
        "attention": json.loads((run / "manifest.json").read_text(encoding="utf-8"))["attention"],
        **({"reference_s": sum(reference)} if reference else {}),
    }


def metrics(run: Path) -> list[Figures]:
    """The whole lines of a run's metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def logged(run: Path) -> list[Figures]:
    """The lines about a step of training."""
    return [line for line in metrics(run) if "loss" in line and "event" not in line]


def figures(case: Case, size: Size, found: Figures, facts: Figures) -> Figures:
    """Rates by the median of the counted steps' times, and by what those steps had to do on either side."""
    first, seconds = size.first[case.method], found["seconds"]
    times = [later - earlier for earlier, later in pairwise(seconds)][first - 1 :]
    did = facts[case.method][first:]
    step = statistics.median(times)
    rate = {key: statistics.mean(one[key] for one in did) / step for key in did[0]}
    reference = found.get("reference_s")
    return {
        "step_s": round(step, 5),
        "slowest_step_s": round(max(times), 5),
        **{f"{name}_per_s": round(rate[name], 2) for name in ("rows", "tokens", "supervised_tokens")},
        "teraflops": round(rate["operations"] / 1e12, 3),
        "mfu": None if facts["peak"] is None else round(rate["operations"] / facts["peak"], 4),
        "peak_memory_gb": round(found["peak_memory_gb"], 3),
        "reference_s": None if reference is None else round(reference, 3),
        "training_s": round(seconds[-1] + (reference or 0.0), 3),
        "losses": found["losses"],
        "attention": found["attention"],
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/gpu-benchmark"))
    parser.add_argument("--toy", action="store_true", help="the same way in small")
    parser.add_argument("--only", choices=["sft", "dpo", "look"])
    parser.add_argument("--skip", action="append", default=[], metavar="WORD", help="leave out cases with this trait")
    parser.add_argument("--sft-steps", type=int, help="steps of SFT (default 20)")
    parser.add_argument("--dpo-steps", type=int, help="steps of DPO (default 16)")
    parser.add_argument("--rounds", type=int, default=1, help="how often every case is measured; the median counts")
    return parser.parse_args()


def sized(said: argparse.Namespace) -> Size:
    """The size that the command line asks for."""
    size = TOY if said.toy else ZAGREUS
    asked = {"sft": said.sft_steps, "dpo": said.dpo_steps}
    steps = {method: asked[method] or default for method, default in size.steps.items()}
    if short := [method for method in METHODS if steps[method] <= size.first[method]]:
        sys.exit(f"{short[0]}: the first {size.first[short[0]]} steps are not counted: ask for more")
    return replace(size, steps=steps)


def chosen(said: argparse.Namespace, flash: bool) -> list[Case]:
    """The cases to measure; with flash-attn, TRL has no need of the other ways to keep documents apart."""
    left_out = set(said.skip) | ({"rows apart", "flex"} if flash else set())
    cases = [case for case in CASES if not left_out & set(case.traits) and not (said.toy and case in NOT_IN_TOY)]
    return [case for case in cases if said.only in (None, case.method)]


class Notes:
    """What was found so far, on the disk after each line."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines, self._began = folder, [], time.monotonic()
        (folder / "figures.jsonl").unlink(missing_ok=True)

    def add(self, **line: Any) -> None:
        """Appends a line and writes the table anew."""
        self._lines.append(line)
        with (self._folder / "figures.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        (self._folder / "table.md").write_text(table(self._lines), encoding="utf-8")

    def progress(self, what: str) -> None:
        """Says what happens now."""
        print(f"{time.monotonic() - self._began:5.0f} s  {what}", file=sys.stderr, flush=True)


def set_up(size: Size, work: Path, settings: dict[str, str]) -> Figures:
    """Makes data and model anew; what is known of them and of this machine."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "size.json").write_text(json.dumps(asdict(size)), encoding="utf-8")
    write_data(size, work)
    for method in METHODS:
        write_recipe(Case(method, "ours"), size, work)
    return child("setup", work, settings)


def main() -> None:
    """Measures, and writes what is found after each measurement."""
    said = arguments()
    size, folder = sized(said), said.folder.resolve()
    work, settings = folder / "work", environment(folder / "work", said.toy)
    folder.mkdir(parents=True, exist_ok=True)
    notes = Notes(folder)
    notes.progress("setup: model and data")
    facts = set_up(size, work, settings)
    notes.add(what="setup", **{name: value for name, value in facts.items() if name not in METHODS})
    if said.only in (None, "look"):
        notes.progress("look: are the numbers right?")
        try:
            notes.add(what="look", **child("look", work, settings))
        except Failed as error:
            notes.add(what="look", error=str(error))
    for case in [case for _ in range(said.rounds) for case in chosen(said, facts["flash_attn"])]:
        notes.progress(f"{case.method}: {case.name}")
        line = {"what": case.method, "side": case.side, "traits": case.traits}
        try:
            found = ours(case, size, work, settings) if case.side == "ours" else child("trl", work, settings, case)
            notes.add(**line, **figures(case, size, found, facts))
        except Failed as error:
            notes.add(**line, error=str(error))
    notes.progress("done")
    shutil.rmtree(work)
    print((folder / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
