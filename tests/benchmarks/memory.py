"""The plan's memory against what a run takes, on a CPU. Run by hand:

    python -m tests.benchmarks.memory BASE --data sft.jsonl [--length 1024] [--dtype bfloat16]

BASE is a folder with a model and its tokenizer. Two steps of SFT, with and without gradient checkpointing, each in a
process of its own; what a run takes is its peak resident memory less what was resident before the model was loaded.
A JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def resident(peak: bool) -> int:
    """Bytes of this process in memory: now, or at its height."""
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measured(raw: dict[str, Any]) -> dict[str, Any]:
    """Trains a recipe in this process; the plan's memory, what was taken, and their ratio."""
    import nesso_tune.run as module
    from nesso_tune.recipes.schema import RECIPES

    seen: dict[str, Any] = {}
    load, plan = module.load_model, module.make_plan

    def loading(*arguments: Any) -> Any:
        seen["before"] = resident(peak=False)
        return load(*arguments)

    def planning(*arguments: Any, **options: Any) -> Any:
        seen["plan"] = plan(*arguments, **options)
        return seen["plan"]

    module.load_model, module.make_plan = loading, planning  # type: ignore[assignment]
    module.train(RECIPES[raw["method"]].model_validate(raw))
    took, planned = resident(peak=True) - seen["before"], seen["plan"].memory.total
    return {"planned_gb": round(planned / 1e9, 3), "took_gb": round(took / 1e9, 3), "ratio": round(planned / took, 3)}


def recipe(said: argparse.Namespace, folder: str, checkpointing: bool) -> dict[str, Any]:
    """Two steps of one packed row."""
    return {
        "method": "sft",
        "output_dir": f"{folder}/run",
        "model": {"base": str(said.base), "dtype": said.dtype, "random_init": said.random},
        "data": {
            "sequence_len": said.length,
            "validation_size": 0,
            "sources": [{"path": str(said.data), "max_rows": 300}],
        },
        "train": {
            "max_steps": 2,
            "micro_batch_size": 1,
            "learning_rate": 1e-4,
            "gradient_checkpointing": checkpointing,
            "torch_compile": False,
        },
        "evaluation": None,
    }


def main() -> None:
    """Measures both, each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--random", action="store_true", help="the base has no weights")
    parser.add_argument("--checkpointing", choices=["true", "false"], help="measure this one in this process")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if said.checkpointing:
            os.environ["NESSO_TUNE_CACHE"] = f"{folder}/cache"
            facts = {
                "base": said.base.name,
                "dtype": said.dtype,
                "gradient_checkpointing": said.checkpointing == "true",
            }
            print(json.dumps(facts | measured(recipe(said, folder, said.checkpointing == "true"))), flush=True)
            return
    for checkpointing in ("false", "true"):
        command = [sys.executable, "-m", "tests.benchmarks.memory", *sys.argv[1:], "--checkpointing", checkpointing]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
