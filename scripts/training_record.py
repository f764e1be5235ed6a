"""Seeded training runs of a source tree, recorded and compared: the proof that a refactoring changes no number.

    python scripts/training_record.py write RECORD            # runs every case with this tree
    python scripts/training_record.py compare RECORD          # runs them again and lists every difference
    python scripts/training_record.py compare RECORD --tree ../other --only dpo,lora

A record holds the metrics of each case (loss, gradient norm, learning rate and everything else that is not a time),
its answers, the fingerprint of its prepared data and the SHA-256 of every file in `final/` but the model card and its
provenance. It also holds a run that was killed by SIGKILL after its first checkpoint: `compare` continues it with the
tree under test, and expects the metrics and weights of the run that was never killed.

Record and compare on the same machine. Exit code 1 means that there is a difference.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = "recipes/quickstart/data"
SHARED: dict[str, Any] = {
    "seed": 7,
    "model": {"base": "recipes/quickstart/base", "random_init": True, "dtype": "float32"},
    "data": {
        "sequence_len": 256,
        "validation_sources": [{"path": f"{DATA}/heldout.jsonl", "max_rows": 20}],
        "sources": [{"path": f"{DATA}/conversations.jsonl", "max_rows": 120}],
    },
    "train": {
        "max_steps": 12,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "schedule": {"type": "cosine", "warmup_ratio": 0.1, "constant_ratio": 0.5, "min_ratio": 0.3},
    },
    "checkpoint": {"every_steps": 4, "keep": 3},
    "evaluation": {"every_steps": 6, "samples": 4, "max_new_tokens": 12},
    "logging": {"every_steps": 1},
}
PAIRS: dict[str, Any] = {
    "validation_sources": [{"path": f"{DATA}/pairs_heldout.jsonl", "max_rows": 8}],
    "sources": [{"path": f"{DATA}/pairs.jsonl", "max_rows": 80}],
}
LORA = {"adapter": {"type": "lora", "r": 4}}
TWO = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
TIMED = re.compile(r"time|second|seconds|_s$|per_|mfu|memory|elapsed|eta|wait|idle|age|bandwidth|disk|rss|peak|tflops")
KILLED = "killed"  # the case that is killed, and continued by a comparison


@dataclass(frozen=True)
class Case:
    """One run: its method, what its recipe sets beyond `SHARED`, and the case whose `final/` is its base."""

    method: str
    sections: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    processes: int = 1
    kill: bool = False  # by SIGKILL after the first checkpoint, then continued


CASES = {
    "sft": Case("sft"),
    "sft_unpacked": Case("sft", {"data": {"packing": False}}),
    "lora": Case("sft", {"model": LORA}, base="sft"),
    "dpo": Case("dpo", {"data": PAIRS, "dpo": {"loss": {"sigmoid": 1.0, "sft": 0.3}}}, base="sft"),
    "dpo_lora": Case("dpo", {"data": PAIRS, "model": LORA}, base="sft"),
    "sft_fsdp": Case("sft", {"train": TWO, "distributed": {"fsdp": "full_shard"}}, processes=2),
    "dpo_fsdp": Case(
        "dpo",
        {"data": PAIRS, "train": TWO, "distributed": {"fsdp": "full_shard", "state_dict": "sharded"}},
        base="sft",
        processes=2,
    ),
    "resumed": Case("sft", kill=True),
}


def recipe_of(case: Case, output: Path, work: Path) -> dict[str, Any]:
    """The recipe as a mapping."""
    recipe: dict[str, Any] = {"method": case.method, "output_dir": str(output)}
    for name in {**SHARED, **case.sections}:
        own, shared = case.sections.get(name), SHARED.get(name)
        recipe[name] = {**(shared or {}), **(own or {})} if isinstance(own or shared, dict) else shared
    if case.base is not None:
        recipe["model"] |= {"base": str(work / case.base / "final"), "random_init": False}
    return recipe


def command_of(case: Case, recipe: Path) -> list[str]:
    """The command line; several processes run FSDP on CPUs."""
    if case.processes == 1:
        return [sys.executable, "-m", "nesso_tune", "train", str(recipe)]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={case.processes}", "--rdzv_backend=c10d"]
    rest = ["--rdzv_endpoint=localhost:0", "-m", "tests.support.fsdp_on_cpu", "train", str(recipe)]
    return [sys.executable, *launcher, *rest]


def environment_of(tree: Path, work: Path) -> dict[str, str]:
    """One thread, no hub, a cache of its own, and the package of `tree`."""
    own = {"PYTHONPATH": str(tree), "NESSO_TUNE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_case(case: Case, output: Path, work: Path, tree: Path, until: str | None = None) -> None:
    """Runs a case to its end, or kills it once the entry `until` exists in its run directory."""
    recipe = work / f"{output.name}.yaml"
    recipe.write_text(json.dumps(recipe_of(case, output, work)), encoding="utf-8")  # JSON is YAML
    with (work / f"{output.name}.log").open("ab") as log:
        environment = environment_of(tree, work)
        process = subprocess.Popen(
            command_of(case, recipe), cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while process.poll() is None:
            if until is not None and (output / until).exists():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.005)
    if process.returncode or until is not None:
        tail = (work / f"{output.name}.log").read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"{output.name}: exit code {process.returncode}\n{tail}")


def outcome_of(output: Path) -> dict[str, Any]:
    """What is compared of a run: metrics by step, answers, the data's fingerprint, hashes of `final/`."""
    metrics: dict[str, dict[str, Any]] = {}
    answers = []
    for line in map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        if "event" not in line:
            kind = "eval" if any(key.startswith("eval_") for key in line) else "train"
            kept = {key: value for key, value in line.items() if not TIMED.search(key)}
            metrics.setdefault(f"{kind} {line['step']}", {}).update(kept)
        elif line["event"] in ("answer", "parent"):
            answers.append({key: value for key, value in line.items() if not TIMED.search(key)})
    described = ("README.md", "provenance.json")  # name the folders of the run, which are temporary
    final = sorted(file for file in (output / "final").rglob("*") if file.name not in described)
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    return {
        "metrics": metrics,
        "answers": answers,
        "data": manifest["data"],
        "final": {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in final if f.is_file()},
    }


def differences(name: str, before: Any, after: Any) -> list[str]:
    """Each leaf that differs, named by its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [one for key in keys for one in differences(f"{name}: {key}", before.get(key), after.get(key))]
    return [] if before == after else [f"{name}: {before!r} became {after!r}"]


def run_all(work: Path, tree: Path, names: list[str]) -> dict[str, Any]:
    """Runs the cases; returns the outcome of each."""
    outcomes = {}
    for name in names:
        began = time.monotonic()
        if CASES[name].kill:
            run_case(CASES[name], work / name, work, tree, until="checkpoint-4")
        run_case(CASES[name], work / name, work, tree)
        outcomes[name] = outcome_of(work / name)
        print(f"{name}: {len(outcomes[name]['metrics'])} logged steps, {time.monotonic() - began:.0f} s", flush=True)
    return outcomes


def write(record: Path, tree: Path) -> None:
    """Runs every case, and leaves a killed run that a comparison continues."""
    record.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outcomes = run_all(work, tree, list(CASES))
        run_case(CASES["sft"], work / KILLED, work, tree, until="checkpoint-4")
        shutil.copytree(work / KILLED, record / KILLED)
    (record / "record.json").write_text(json.dumps(outcomes, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{record}: {len(outcomes)} cases")


def compare(record: Path, tree: Path, names: list[str]) -> None:
    """Runs the cases again, and continues the record's killed run; lists what differs."""
    recorded = json.loads((record / "record.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(record / KILLED, work / KILLED)
        outcomes = run_all(work, tree, names)
        found = [one for name in names for one in differences(name, recorded[name], outcomes[name])]
        run_case(CASES["sft"], work / KILLED, work, tree)
        continued = outcome_of(work / KILLED)
        found += differences(f"{KILLED}, continued", recorded["sft"], continued)
    print("\n".join([*found, f"{len(found)} differences"]))
    sys.exit(bool(found))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("record", type=Path)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the source tree to run; default: this one")
    parser.add_argument("--only", default=",".join(CASES), help="cases of a comparison; a base's case comes first")
    options = parser.parse_args()
    tree = options.tree.resolve()
    if options.action == "write":
        write(options.record, tree)
    else:
        names = options.only.split(",")
        needed = {CASES[name].base for name in names} - {None, *names}
        compare(options.record, tree, [*sorted(needed), *names])  # type: ignore[type-var]


if __name__ == "__main__":
    main()
