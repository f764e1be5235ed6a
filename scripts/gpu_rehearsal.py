"""Trains one recipe on the GPUs of this machine with every launcher and compares the losses.

    python scripts/gpu_rehearsal.py [FOLDER]

40 steps of the quickstart SFT: `train` on one GPU, `torchrun` on one GPU (an NCCL group of one), `launch` on all GPUs
under FULL_SHARD with full and sharded checkpoints and under DDP, and a run resumed with another world size. Prints a
Markdown table. Without a GPU it runs single processes on the CPU; tests/distributed/test_process_group.py covers
several.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

STEPS = 40
TRAIN = ["--set", f"train={{max_steps: {STEPS}, global_batch_size: 8, micro_batch_size: 1, learning_rate: 1.0e-3}}",
         "--set", "evaluation=null", "--set", "logging.every_steps=1", "--set", "model.dtype=float32"]  # fmt: skip


def run(folder, name, launcher, *settings):
    """Runs the recipe; returns (name, seconds, losses by step)."""
    words = ["quickstart/sft", *TRAIN, "--set", f"output_dir={folder / name}"]
    words += [word for setting in settings for word in ("--set", setting)]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", *launcher, *words], check=True)
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return name, time.monotonic() - began, {line["step"]: line["loss"] for line in lines if "loss" in line}


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/gpu-rehearsal").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    gpus = torch.cuda.device_count()
    torchrun = ["torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    launch = ["nesso_tune", "launch"]
    rows = [
        run(folder, "train, one process", ["nesso_tune", "train"]),
        run(folder, "torchrun, one process", [*torchrun, "-m", "nesso_tune", "train"]),
    ]
    if gpus > 1:
        rows += [
            run(folder, "launch, sharded", launch, "distributed.fsdp=full_shard"),
            run(folder, "launch, in shards", launch, "distributed={fsdp: full_shard, state_dict: sharded}"),
            run(folder, "launch, DDP", launch, "distributed.fsdp=none"),
        ]
        again = folder / "launch, in shards"
        shutil.rmtree(again / "final")
        shutil.rmtree(again / f"checkpoint-{STEPS}")
        rows.append(run(folder, again.name, ["nesso_tune", "train"], "distributed.state_dict=sharded"))
        rows[-1] = (f"{again.name}, resumed on one", *rows[-1][1:])
    whole = rows[0][2]
    kind = torch.cuda.get_device_name() if gpus else "CPU"
    print(f"\n{max(gpus, 1)} x {kind}, torch {torch.__version__}, float32, {STEPS} steps\n")
    print("| launcher | seconds | last loss | max. difference to first row |\n|---|---|---|---|")
    for name, seconds, losses in rows:
        apart = max(abs(losses[step] - whole[step]) for step in whole)
        print(f"| {name} | {seconds:.0f} | {losses[STEPS]:.6f} | {apart:.1e} |")


if __name__ == "__main__":
    main()
