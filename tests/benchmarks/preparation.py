"""Preparing data, ours beside TRL and Axolotl: whole processes from the shell to the finished cache, in turn.

python -m tests.benchmarks.preparation --data sft.jsonl --base ASSETS/tiny [--trl PEER.py] [--axolotl PYTHON]
                                       [--runs 5] [--times 20]

--data     JSON lines with `messages`
--base     a folder with config.json and a tokenizer, inside a folder that is handed to PEER.py
--trl      a script that prepares the same data with TRL: `PEER.py prepare ASSETS --num-proc 2`
--axolotl  the Python of an environment with Axolotl
--times    afterwards the data that many times over, every copy with other words, is prepared once, and its memory and
           speed are compared

Each run has a cache of its own; one of each comes before and is not counted. A JSON line a measurement, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

SEQUENCE = 4096
AXOLOTL = """\
base_model: {base}
datasets:
  - {{path: {data}, ds_type: json, type: chat_template, field_messages: messages, roles_to_train: [assistant],
     train_on_eos: turn}}
chat_template: chatml
special_tokens: {{pad_token: "<|im_end|>", eos_token: "<|im_end|>"}}
dataset_prepared_path: {folder}/prepared
output_dir: {folder}/out
val_set_size: 0
sequence_len: {length}
sample_packing: true
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 1.0e-4
optimizer: adamw_torch
"""


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Seconds, peak memory of the process and all its children together in MB, and what it printed."""
    started, peak = time.perf_counter(), 0
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        with out.open("w") as stdout, (Path(folder) / "err").open("w") as stderr:
            process = psutil.Popen(command, stdout=stdout, stderr=stderr, env={**os.environ, **environment})
            while process.poll() is None:
                peak = max(peak, _memory(process))
                time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.returncode:
            sys.exit((Path(folder) / "err").read_text()[-3000:])
        return seconds, peak / 1e6, out.read_text()


def _memory(process: psutil.Popen) -> int:
    total = 0
    for one in _all_of(process):
        with suppress(psutil.Error):  # it ended meanwhile
            total += one.memory_info().rss
    return total


def _all_of(process: psutil.Popen) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def ours(base: Path, data: Path, language: str | None = None) -> tuple[float, float, dict[str, Any]]:
    """One preparation by nesso-tune: seconds, memory, its report."""
    with TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            f"method: sft\noutput_dir: {folder}/run\nmodel: {{base: {base}}}\n"
            f"data: {{sequence_len: {SEQUENCE}, validation_size: 0, "
            f"sources: [{{path: {data}{f', language: {language}' if language else ''}}}]}}\n"
        )
        command = [sys.executable, "-m", "nesso_tune", "prepare", str(recipe), "--json"]
        seconds, memory, said = measured(command, {"NESSO_TUNE_CACHE": f"{folder}/cache"})
        return seconds, memory, json.loads(said)


def without_languages(data: Path, folder: Path) -> Path:
    """The data without its column `lang`, so that languages are detected."""
    file = folder / "unlabelled.jsonl"
    rows = map(json.loads, data.read_text(encoding="utf-8").splitlines())
    lines = (
        json.dumps({key: value for key, value in row.items() if key != "lang"}, ensure_ascii=False) for row in rows
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def trl(script: Path, base: Path) -> float:
    """Seconds of one preparation by TRL with two processes."""
    return measured([sys.executable, str(script), "prepare", str(base.parent), "--num-proc", "2"], {})[0]


def axolotl(python: Path, base: Path, data: Path) -> float:
    """Seconds of one `axolotl preprocess`."""
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(AXOLOTL.format(base=base, data=data, folder=folder, length=SEQUENCE))
        silent = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                  "HF_DATASETS_CACHE": f"{folder}/hf"}  # fmt: skip
        return measured([str(python), "-m", "axolotl.cli.preprocess", str(config)], silent)[0]


def in_turn(sides: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Seconds of each side, measured in turn; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(runs + 1):
        for name, run in sides.items():
            seconds = run()
            print(json.dumps({"side": name, "run": number, "seconds": round(seconds, 2)}), flush=True)
            if number:
                taken[name].append(seconds)
    return taken


def larger(data: Path, times: int, folder: Path) -> Path:
    """The data many times over; every user turn of copy k ends with its number, so that no row is there twice."""
    file = folder / "larger.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for k in range(times):
            for line in data.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                for message in row["messages"]:
                    message["content"] += f" ({k})" if message["role"] == "user" else ""
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def scale(base: Path, data: Path, times: int) -> None:
    """Memory and tokens a second of the data once and many times over, start-up (ten rows) taken off."""
    with TemporaryDirectory() as name:
        few = Path(name) / "few.jsonl"
        few.write_text("\n".join(data.read_text(encoding="utf-8").splitlines()[:10]) + "\n", encoding="utf-8")
        start = statistics.median(ours(base, few)[0] for _ in range(3))
        print("| rows | tokens | peak memory, all processes | tokens a second, start-up taken off |\n|---|---|---|---|")
        for file in (data, larger(data, times, Path(name))):
            seconds, memory, report = ours(base, file)
            speed = report["tokens"] / (seconds - start)
            print(f"| {report['rows_read']:,} | {report['tokens']:,} | {memory:,.0f} MB | {speed:,.0f} |", flush=True)


def whole_documents(base: Path, data: Path) -> None:
    """How full rows are, and that every document is in one row, whole."""
    from nesso_tune import SFTRecipe, prepare_data

    with TemporaryDirectory() as folder:
        os.environ["NESSO_TUNE_CACHE"] = f"{folder}/cache"
        section = {"sequence_len": SEQUENCE, "validation_size": 0, "sources": [{"path": str(data)}]}
        recipe = {"output_dir": f"{folder}/run", "model": {"base": str(base)}, "data": section}
        prepared = prepare_data(SFTRecipe.model_validate(recipe))
        packed, documents = Counter[tuple[int, ...]](), prepared.train.documents
        for row in prepared.train:
            start = 0
            for length in row["seq_lengths"]:
                packed[tuple(row["input_ids"][start : start + length])] += 1
                start += length
        whole = Counter(tuple(documents.input_ids(i).tolist()) for i in range(len(documents)))
        print(f"packing: {prepared.summary.packing.to_dict()}, documents split: {(packed - whole).total()}")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name in ("--data", "--base"):
        parser.add_argument(name, type=lambda path: Path(path).absolute(), required=True)
    for name in ("--trl", "--axolotl"):
        parser.add_argument(name, type=lambda path: Path(path).absolute())
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--times", type=int)
    asked = parser.parse_args()
    scratch = TemporaryDirectory()
    unlabelled = without_languages(asked.data, Path(scratch.name))
    sides: dict[str, Callable[[], float]] = {
        "nesso-tune": lambda: ours(asked.base, asked.data)[0],
        "nesso-tune, languages detected": lambda: ours(asked.base, unlabelled, "auto")[0],
    }
    if asked.trl:
        sides["TRL, 2 processes"] = lambda: trl(asked.trl, asked.base)
    if asked.axolotl:
        sides["axolotl preprocess"] = lambda: axolotl(asked.axolotl, asked.base, asked.data)
    taken = in_turn(sides, asked.runs)
    own = statistics.median(taken["nesso-tune"])
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}\n")
    print("| | seconds, median | fastest, slowest | ratio |\n|---|---|---|---|")
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.2f} | {min(seconds):.2f}, {max(seconds):.2f} | {middle / own:.1f} |")
    print()
    whole_documents(asked.base, asked.data)
    if asked.times:
        scale(asked.base, asked.data, asked.times)


if __name__ == "__main__":
    main()
