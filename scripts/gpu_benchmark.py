"""Compares training with TRL on one GPU, on the same rows: speed, memory and numerical accuracy.

    python scripts/gpu_benchmark.py [FOLDER] [--toy] [--only sft|dpo|look] [--skip WORD]
        [--sft-steps N] [--dpo-steps N] [--rounds N]

The model has the shape of Zagreus and random weights; SFT is packed to 4096 tokens, DPO is limited to 1024; float32
weights under bfloat16 autocast. No network is needed. After each measurement a line is appended to
FOLDER/figures.jsonl and FOLDER/table.md is rewritten, so an interrupted run keeps its results. `--toy` runs a small
version, also on a CPU. docs/benchmarks.md describes the comparison.
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

from gpu_benchmark_cases import CASES, METHODS, NOT_IN_TOY, ROOT, TOY, ZAGREUS, Case, Size, write_data, write_recipe
from gpu_benchmark_table import table

TIMEOUT_S = 240  # per case
Figures = dict[str, Any]


class Failed(Exception):
    """A case failed; the message is the last line of its output."""


def environment(work: Path, toy: bool) -> dict[str, str]:
    """Environment of both sides: one GPU, Hub offline, separate caches."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    fixed = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT),
             "NESSO_TUNE_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets"),
             "CUDA_VISIBLE_DEVICES": visible}  # fmt: skip
    return {**os.environ, **fixed, **({"OMP_NUM_THREADS": "1"} if toy else {})}


def last_line(log: Path) -> str:
    """The last line of a log file."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def child(what: str, work: Path, settings: dict[str, str], case: Case | None = None) -> Figures:
    """Runs gpu_benchmark_child.py and returns its JSON result.

    Raises:
        Failed: on a non-zero exit code or a timeout.
    """
    log = work / "log"
    command = [sys.executable, str(Path(__file__).with_name("gpu_benchmark_child.py")), what, str(work)]
    command += [json.dumps(asdict(case))] if case else []
    with log.open("w") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=settings, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise Failed(f"timed out after {TIMEOUT_S} s") from None
    if done.returncode:
        raise Failed(last_line(log))
    answer: Figures = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours(case: Case, size: Size, work: Path, settings: dict[str, str]) -> Figures:
    """Runs nesso-tune and reads its metrics.jsonl. The process is killed after the last step, before saving.

    Raises:
        Failed: if it exits earlier, or on a timeout.
    """
    run, log, began = work / "run", work / "log", time.monotonic()
    shutil.rmtree(run, ignore_errors=True)
    if case.method == "dpo" and "cached reference" not in case.traits:
        shutil.rmtree(work / "cache" / "reference", ignore_errors=True)
    command = [sys.executable, "-m", "nesso_tune", "train", str(write_recipe(case, size, work))]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=settings, cwd=ROOT)
        try:
            while len(steps := logged(run)) < size.steps[case.method]:
                if process.poll() is not None:
                    raise Failed(last_line(log))
                if time.monotonic() - began > TIMEOUT_S:
                    raise Failed(f"timed out after {TIMEOUT_S} s")
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
    """The complete lines of a run's metrics.jsonl so far."""
    file = run / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def logged(run: Path) -> list[Figures]:
    """The lines of training steps."""
    return [line for line in metrics(run) if "loss" in line and "event" not in line]


def figures(case: Case, size: Size, found: Figures, facts: Figures) -> Figures:
    """Throughput from the median time of the measured steps and their mean workload, which both sides share."""
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
        "teraflops": float(f"{rate['operations'] / 1e12:.4g}"),
        "mfu": None if facts["peak"] is None else round(rate["operations"] / facts["peak"], 4),
        "peak_memory_gb": round(found["peak_memory_gb"], 3),
        "reference_s": None if reference is None else round(reference, 3),
        "training_s": round(seconds[-1] + (reference or 0.0), 3),
        "losses": found["losses"],
        "attention": found["attention"],
    }


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/gpu-benchmark"))
    parser.add_argument("--toy", action="store_true", help="a small version, also on a CPU")
    parser.add_argument("--only", choices=["sft", "dpo", "look"])
    parser.add_argument("--skip", action="append", default=[], metavar="WORD", help="skip cases with this trait")
    parser.add_argument("--sft-steps", type=int, help="SFT steps (default 20)")
    parser.add_argument("--dpo-steps", type=int, help="DPO steps (default 16)")
    parser.add_argument(
        "--rounds", type=int, default=1, help="measurements per case; the median is reported (default 1)"
    )
    return parser.parse_args()


def selected_size(options: argparse.Namespace) -> Size:
    """The workload selected on the command line."""
    size = TOY if options.toy else ZAGREUS
    given = {"sft": options.sft_steps, "dpo": options.dpo_steps}
    steps = {method: given[method] or default for method, default in size.steps.items()}
    if short := [method for method in METHODS if steps[method] <= size.first[method]]:
        sys.exit(f"{short[0]}: the first {size.first[short[0]]} steps are warm-up; increase --{short[0]}-steps")
    return replace(size, steps=steps)


def selected_cases(options: argparse.Namespace, flash: bool) -> list[Case]:
    """The cases to measure. With flash-attn, TRL does not need the other ways to separate documents."""
    skipped = set(options.skip) | ({"rows apart", "flex"} if flash else set())
    cases = [case for case in CASES if not skipped & set(case.traits) and not (options.toy and case in NOT_IN_TOY)]
    return [case for case in cases if options.only in (None, case.method)]


class Results:
    """Results so far, written to disk after each line."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines, self._began = folder, [], time.monotonic()
        (folder / "figures.jsonl").unlink(missing_ok=True)

    def add(self, **line: Any) -> None:
        """Appends a line and rewrites the table."""
        self._lines.append(line)
        with (self._folder / "figures.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        (self._folder / "table.md").write_text(table(self._lines), encoding="utf-8")

    def progress(self, what: str) -> None:
        """Prints progress to stderr."""
        print(f"{time.monotonic() - self._began:5.0f} s  {what}", file=sys.stderr, flush=True)


def set_up(size: Size, work: Path, settings: dict[str, str]) -> Figures:
    """Creates data and model; returns facts about them and the machine."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "size.json").write_text(json.dumps(asdict(size)), encoding="utf-8")
    write_data(size, work)
    for method in METHODS:
        write_recipe(Case(method, "ours"), size, work)
    return child("setup", work, settings)


def main() -> None:
    """Runs all selected cases and writes the results after each."""
    options = parse_arguments()
    size, folder = selected_size(options), options.folder.resolve()
    work, settings = folder / "work", environment(folder / "work", options.toy)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    results.progress("setup: model and data")
    facts = set_up(size, work, settings)
    results.add(what="setup", **{name: value for name, value in facts.items() if name not in METHODS})
    if options.only in (None, "look"):
        results.progress("look: numerical accuracy")
        try:
            results.add(what="look", **child("look", work, settings))
        except Failed as error:
            results.add(what="look", error=str(error))
    for case in [case for _ in range(options.rounds) for case in selected_cases(options, facts["flash_attn"])]:
        results.progress(f"{case.method}: {case.name}")
        line = {"what": case.method, "side": case.side, "traits": case.traits}
        try:
            found = ours(case, size, work, settings) if case.side == "ours" else child("trl", work, settings, case)
            results.add(**line, **figures(case, size, found, facts))
        except Failed as error:
            results.add(**line, error=str(error))
    results.progress("done")
    shutil.rmtree(work)
    print((folder / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
