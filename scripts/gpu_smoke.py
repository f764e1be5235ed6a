"""Trains each kind of run for 8 steps on one GPU and prints one line for each: OK, or what failed.

    python scripts/gpu_smoke.py [CASE ...] [--wheels FOLDER] [--toy]

Every case evaluates and saves every second step and runs twice: undisturbed, and killed with SIGKILL after the first
checkpoint and resumed by the same command. The final weights must be equal; on a GPU, where rounding may differ, the
largest difference is printed. `--toy` runs a tiny model, also on a CPU. The exit code is 1 if a case failed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpu_wheels import ROOT, environment
from gpu_workload import TOY, Failed, Line, Size, difference, run, write_data, write_recipe

STEPS, EVERY, LIMIT_S = 8, 2, 240
LAYERS_OF_ZAGREUS = Size((32768, 960, 2560, 4, 15, 5, 64), {"sft": 2048, "dpo": 1024}, {"sft": 8, "dpo": 8}, STEPS, 1)
LORA = {"r": 8, "alpha": 16, "target_modules": "all-linear"}
CASES: dict[str, Line] = {  # name -> sections of the recipe
    "sft": {"model": {"dtype": "float32"}},
    "dpo": {"method": "dpo"},
    "lora": {"model": {"adapter": {"type": "lora", **LORA}}},
    "qlora": {"model": {"adapter": {"type": "qlora", **LORA}}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "flash": {"model": {"attention": "flash"}},
}
TRAIN = [sys.executable, "-m", "nesso_tune", "train"]


@dataclass(frozen=True)
class Bench:
    """What the cases share: folder, workload, environment of their processes, facts about the machine."""

    work: Path
    size: Size
    settings: dict[str, str]
    facts: Line

    def case(self, name: str) -> str:
        """Runs a case twice and describes it; raises Failed."""
        sections, method = CASES[name], CASES[name].get("method", "sft")
        if name == "flash" and not self.facts["gpu"]:
            sections = {"model": {"attention": "sdpa"}}  # the only kernel of a CPU
        sections = {"data": {"validation_size": 8}, "checkpoint": {"every_steps": EVERY, "keep": 1},
                    "evaluation": {"every_steps": EVERY, "samples": 2, "max_new_tokens": 16}, **sections}  # fmt: skip
        folders = [self.work / f"{name}-{kind}" for kind in ("whole", "killed")]
        recipes = [write_recipe(self.size, method, self.work, folder, sections) for folder in folders]
        checkpoint = folders[1] / f"checkpoint-{EVERY}"
        for recipe, stop in ((recipes[0], None), (recipes[1], checkpoint.is_dir), (recipes[1], None)):
            if (folders[1] / "final").exists():
                raise Failed("the run ended before it could be killed")
            run([*TRAIN, str(recipe)], recipe, self.settings, LIMIT_S, stop)  # killed when `stop()`
        kernel = json.loads((folders[0] / "manifest.json").read_text())["attention"]
        if name == "flash" and self.facts["gpu"] and "flash" not in kernel:
            raise Failed(f"attention is {kernel}")
        found = difference(*folders, self.settings, LIMIT_S)
        if found and not self.facts["gpu"]:
            raise Failed(f"weights after kill and resume differ by up to {found}")
        return f"{kernel}; {check(*folders)}; largest difference after kill and resume {found}"


def check(whole: Path, killed: Path) -> str:
    """Checks the metrics of both runs; raises Failed."""
    for folder in (whole, killed):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        evaluated = {line["step"] for line in lines if "eval_loss" in line}
        complete = list(losses) == list(range(1, STEPS + 1)) and evaluated == set(range(EVERY, STEPS + 1, EVERY))
        if not complete or not all(0 < loss < 100 for loss in losses.values()):
            raise Failed(f"{folder.name}: losses {losses}, evaluated at {evaluated}")
    if not any(line.get("event") == "resumed" for line in lines):
        raise Failed("the killed run started again instead of resuming")
    return f"loss {losses[1]:.3f} to {losses[STEPS]:.3f}"


def main() -> None:
    """Runs the cases side by side and prints their lines in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--wheels", type=Path, help="the folder that gpu_wheels.py wrote")
    parser.add_argument("--toy", action="store_true", help="a tiny model; also on a CPU")
    options, began, bad = parser.parse_args(), time.monotonic(), 0
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown cases: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    size = replace(TOY, steps=STEPS, first=1) if options.toy else LAYERS_OF_ZAGREUS
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work, settings = Path(folder), environment(Path(folder), options.wheels)
        write_data(size, work)
        command = [
            sys.executable,
            str(ROOT / "scripts" / "gpu_workload.py"),
            str(work / "base"),
            json.dumps(asdict(size)),
        ]
        facts = json.loads(run(command, work / "base", settings, LIMIT_S))
        bench = Bench(work, size, settings, facts)
        names = [name for name in options.cases or CASES if name != "qlora" or facts["bitsandbytes"]]
        with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2) if facts["gpu"] else 2) as pool:
            started = {name: pool.submit(bench.case, name) for name in names}
            for name, result in started.items():
                bad += (error := result.exception()) is not None
                print(f"{name}: " + (f"FAILED: {error!r}" if error else f"OK ({result.result()})"), flush=True)
    if len(names) < len(options.cases or CASES):
        print("qlora: not run: bitsandbytes is not installed")
    print(f"{len(names) - bad} of {len(names)} OK in {time.monotonic() - began:.0f} s; {facts}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
