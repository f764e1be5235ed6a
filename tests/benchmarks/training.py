"""Training beside TRL on the same work, in turn. Run by hand on a quiet machine:

    python -m tests.benchmarks.training sft --assets ASSETS --peer PEER.py --data sft.jsonl [--rounds 3]
    python -m tests.benchmarks.training dpo --assets ASSETS --peer PEER.py --data pref.jsonl [--precompute]
    python -m tests.benchmarks.training start --assets ASSETS --data sft.jsonl

ASSETS holds `tiny`, `mid` and `zagreus`, folders with a model and its chat tokenizer; PEER.py runs TRL on them and
prints a JSON line. Whole processes, one side after the other, the same model, rows, precision and tokens a step.

- sft: packed rows of 1024 tokens on the Zagreus shape; tokens a second after the first step, and peak memory.
- dpo: pairs within 1024 tokens on the mid model, 4 x 2 a step, one epoch; seconds of training, in which ours has its
  pass over the reference, and pairs a second after the first step.
- start: seconds from the shell to the end of the first optimizer step, on the tiny base.

One JSON line a measurement, then a line with the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 1024
Figures = dict[str, float]


def timed(command: list[str], **environment: str) -> tuple[str, float, float]:
    """Output, seconds and peak memory (MB) of a whole process."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, env={**os.environ, **environment})
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(said.decode(errors="replace")[-3000:])
        out.seek(0)
        return out.read().decode(), time.monotonic() - began, usage.ru_maxrss / 1024


def recipe(method: str, folder: Path, base: Path, data: Path, said: argparse.Namespace) -> dict[str, Any]:
    """The same work as a recipe."""
    sft = method == "sft"
    source = {"path": str(data)} | ({"max_rows": 600} if said.what == "sft" else {})
    return {
        "method": method,
        "output_dir": str(folder / "run"),
        "model": {"base": str(base), "dtype": said.dtype},
        "data": {"sequence_len": LENGTH, "validation_size": 0, "sources": [source]},
        "train": {
            "micro_batch_size": 1 if sft else 4,
            "gradient_accumulation_steps": 1 if sft else 2,
            "learning_rate": 1e-4 if sft else 1e-6,
            "gradient_checkpointing": False,
            "schedule": {"type": "linear", "warmup_steps": 0},
            **({"max_steps": said.steps} if sft else {"num_epochs": 1.0}),
            **json.loads(said.train),
        },
        "evaluation": None,
        "logging": {"every_steps": 1},
        "checkpoint": None,  # the peer saves none either
    }


def ours(said: argparse.Namespace, data: Path) -> Figures:
    """Our figures: rates from the lines of metrics.jsonl, everything between the lines included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = said.assets / {"sft": "zagreus", "dpo": "mid", "start": "tiny"}[said.what]
        method = "dpo" if said.what == "dpo" else "sft"
        file = folder / "recipe.yaml"
        file.write_text(json.dumps(recipe(method, folder, base, data, said)))
        command = [sys.executable, "-m", "nesso_tune", "train", str(file)]
        if said.what == "start":
            return {"first_step_s": first_line(command, folder)}
        _, whole, memory = timed(command, NESSO_TUNE_CACHE=str(folder / "cache"))
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        figures = {"whole_s": round(whole, 2), "max_rss_mb": round(memory)}
        rest = steps[-1]["seconds"] - steps[0]["seconds"]
        if said.what == "sft":
            return figures | {"tokens_per_s": round((steps[-1]["tokens"] - steps[0]["tokens"]) / rest, 1)}
        return figures | {"pairs_per_s": round(8 * (len(steps) - 1) / rest, 3), "train_s": steps[-1]["seconds"]}


def first_line(command: list[str], folder: Path) -> float:
    """Seconds from the start of a process to its first line about a step, written right after the update."""
    began, file = time.monotonic(), folder / "run" / "metrics.jsonl"
    environment = {**os.environ, "NESSO_TUNE_CACHE": str(folder / "cache")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    while not (file.exists() and '"loss"' in file.read_text()):
        if process.poll() is not None:
            sys.exit(process.stderr.read().decode()[-3000:] if process.stderr else "")
        time.sleep(0.005)
    seconds = time.monotonic() - began
    process.wait()
    return round(seconds, 2)


TRL_START = """
import sys
from datasets import disable_caching, load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
disable_caching()
class Stop(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("first step", flush=True)
base, data, folder = sys.argv[1:]
rows = load_dataset("json", data_files=data, split="train").remove_columns(["lang", "source"])
SFTTrainer(
    model=base, processing_class=AutoTokenizer.from_pretrained(base), train_dataset=rows, callbacks=[Stop()],
    args=SFTConfig(output_dir=folder, use_cpu=True, report_to="none", save_strategy="no", bf16=True, max_length=1024,
                   packing=True, assistant_only_loss=True, max_steps=1, per_device_train_batch_size=1,
                   gradient_checkpointing=False, disable_tqdm=True),
).train()
"""


def trl_first_step(base: Path, data: Path) -> float:
    """Seconds from the start of a process to the end of TRL's first step, on the same rows."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-c", TRL_START, str(base), str(data), folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "first step" in line:
                seconds = time.monotonic() - began
        process.wait()
    return round(seconds, 2)


def theirs(said: argparse.Namespace, data: Path) -> Figures:
    """What the peer's script prints."""
    if said.what == "start":
        return {"first_step_s": trl_first_step(said.assets / "tiny", data)}
    options = ["--data", str(data)] if said.what == "dpo" else ["--steps", str(said.steps)]
    options += (
        ["--pairs", str(said.pairs)] + (["--precompute"] if said.precompute else []) if said.what == "dpo" else []
    )
    mode = "dpo" if said.what == "dpo" else "sft"
    out, _, memory = timed([sys.executable, str(said.peer), mode, str(said.assets), *options])
    figures: Figures = json.loads(out.splitlines()[-1])
    return figures | {"max_rss_mb": round(memory)}


def within(said: argparse.Namespace, folder: Path) -> Path:
    """The first pairs that both sides can train on: prompt and longer answer within the length, as TRL counts them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(said.assets / "mid")
    kept = []
    for line in said.data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        lengths = [
            len(tokenizer.apply_chat_template(row["prompt"] + row[key], tokenize=True, return_dict=False))
            for key in ("chosen", "rejected")
        ]
        if max(lengths) <= LENGTH:
            kept.append(line)
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(kept[: said.pairs]) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Measures both sides in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sft", "dpo", "start"])
    for name in ("assets", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--peer", type=Path, help="for sft and dpo")
    for name, default in (("rounds", 3), ("steps", 6), ("pairs", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="the peer has its own")
    parser.add_argument("--train", default="{}", help="further keys of our `train`, as JSON")
    parser.add_argument("--precompute", action="store_true", help="TRL computes its reference beforehand, too")
    parser.add_argument("--only", choices=["ours", "theirs"])
    said = parser.parse_args()
    found: dict[str, list[Figures]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as name:
        data = within(said, Path(name)) if said.what == "dpo" else said.data
        for _ in range(said.rounds):
            for side, measure in (("ours", ours), ("theirs", theirs)):
                if said.only in (None, side):
                    found[side].append(measure(said, data))
                    print(json.dumps({"side": side, "what": said.what, **found[side][-1]}), flush=True)
    if not said.only:
        both = {key for key in found["ours"][0] if key in found["theirs"][0]}
        medians = {key: [statistics.median(one[key] for one in found[side]) for side in found] for key in sorted(both)}
        print(json.dumps({key: {"ours": a, "theirs": b, "ratio": round(a / b, 3)} for key, (a, b) in medians.items()}))


if __name__ == "__main__":
    main()
