"""Measures nesso-tune and TRL on one GPU, in one call of at most ten minutes, and prints one Markdown table.

    python scripts/gpu_benchmark.py [FOLDER] [--wheels FOLDER] [--toy] [--minutes 9.5] [--only WORD]

The shape of Zagreus with random weights on generated conversations: no download. FOLDER/table.md is rewritten after
each case. docs/benchmarks.md describes the cases. The parent process needs the standard library only.
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_workload as given
from gpu_wheels import ROOT, environment
from gpu_workload import Failed, Line, Size

CASE_LIMIT_S, SHORTEST_S = 150, 25  # a case is ended after the first, and not started with less than the second left
KERNELS = {"flash": "attention", "fmha": "attention", "attention": "attention", "gemm": "matmul", "nvjet": "matmul",
           "cutlass": "matmul", "::mm": "matmul", "addmm": "matmul", "triton": "compiled"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measurement: method, nesso-tune or TRL, micro batch size, and deviations from the default."""

    method: str
    side: str
    micro: int | str
    variant: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.method.upper(), self.side, f"micro batch {self.micro}", *self.variant])


CASES = (  # what decides most comes first: cases that start too late are left out
    *(Case("sft", "nesso-tune", micro, ("compiled",)) for micro in (8, "auto", 4, 1)),
    Case("sft", "TRL", 8, ("rows apart",)),
    Case("dpo", "nesso-tune", 8),
    Case("dpo", "TRL", 8, ("precomputed reference",)),
    Case("sft", "nesso-tune", 8),
    Case("sft", "nesso-tune", "best", ("profile",)),
    Case("sft", "TRL", 8, ("rows apart", "compiled")),
    Case("sft", "TRL", 4, ("flex", "compiled")),
    *(Case("sft", "nesso-tune", micro) for micro in ("auto", 4, 1)),
    Case("dpo", "TRL", 8),
)
NOT_IN_TOY = {case for case in CASES if case.micro == 4 or "compiled" in case.variant}  # they take minutes on a CPU


# Child processes: they import torch, TRL and nesso-tune, which the parent cannot.
def setup(size: Size, work: Path, *_: str) -> Line:
    """Saves the base model; returns the machine, and for each step its tokens and FLOPs by both conventions."""
    import torch

    from nesso_tune.recipes.schema import TrainSection
    from nesso_tune.training.throughput import TrainingFlops, device_peak

    model, per_step = given.save_base(size, work / "base"), {}
    for method, count in size.rows.items():
        each = [given.workload(row, TrainingFlops.of(model)) for row in given.prepared(size, method, work)]
        chunks = [each[i : i + count] for i in range(0, len(each), count)]
        per_step[method] = [[sum(column) for column in zip(*chunk, strict=True)] for chunk in chunks]
    parts = [torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"]
    parts += [f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "accelerate", "nesso-tune")]
    known = json.dumps(TrainSection.model_json_schema()["properties"]["micro_batch_size"])
    return {"machine": ", ".join([*parts, f"{model.num_parameters() / 1e6:.1f} M parameters"]),
            "peak": device_peak(), "auto": '"auto"' in known, "work": per_step}  # fmt: skip


def trl(size: Size, work: Path, *arguments: str) -> Line:
    """Trains with TRL on the same rows in the same order and precision; the fastest settings that it has here."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from nesso_tune.training.throughput import peak_memory

    case = Case(**json.loads(arguments[0]))
    gpu, lines = torch.cuda.is_available(), []
    flash, liger = gpu and find_spec("flash_attn") is not None, gpu and find_spec("liger_kernel") is not None
    kernel = "flex_attention" if "flex" in case.variant else "flash_attention_2" if flash else "sdpa"

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Line | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                lines.append({"step": state.global_step, "seconds": time.monotonic(), "loss": logs["loss"]})

    def apart(rows: list[Line]) -> Line:
        """TRL's collator, but packed rows remain a batch: attention masks then cover one row, not the whole batch."""
        batch = DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)(rows)
        del batch["attention_mask"]  # transformers separates documents by position_ids only without a mask
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch

    shared = {"output_dir": str(work / "trl"), "report_to": "none", "save_strategy": "no", "logging_steps": size.first,
              "logging_first_step": True, "disable_tqdm": True, "seed": given.SEED, "use_cpu": not gpu, "bf16": True,
              "use_liger_kernel": liger, "max_steps": size.steps, "per_device_train_batch_size": case.micro,
              "gradient_accumulation_steps": size.rows[case.method] // case.micro, "gradient_checkpointing": False,
              "learning_rate": given.RATES[case.method], "lr_scheduler_type": "constant", "max_length": None,
              "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "train_sampling_strategy": "sequential",
              "torch_compile": "compiled" in case.variant, "weight_decay": 0.0,
              "model_init_kwargs": {"dtype": "float32", "attn_implementation": kernel}}  # fmt: skip
    settings: Line = {"model": str(work / "base"), "callbacks": [Clock()],
                   "processing_class": AutoTokenizer.from_pretrained(work / "base")}  # fmt: skip
    columns, rows = given.COLUMNS[case.method], given.prepared(size, case.method, work)
    settings["train_dataset"] = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    if case.method == "dpo":
        shared["precompute_ref_log_probs"] = "precomputed reference" in case.variant
        tokenized = type("Tokenized", (DPOTrainer,), {"_prepare_dataset": lambda _, rows, *__: rows})
        trainer = tokenized(**settings, args=DPOConfig(**shared, beta=0.1))
    else:
        packed = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "padding_free": flash}
        settings |= {} if flash else {"data_collator": apart}
        trainer = SFTTrainer(**settings, args=SFTConfig(**shared, **packed))
    trainer.train()
    return {"lines": lines, "memory": peak_memory() / 1e9, "attention": kernel + (", liger" if liger else "")}


def ours(case: Case, size: Size, work: Path, settings: dict[str, str], seconds: float) -> Line:
    """Runs nesso-tune and reads metrics.jsonl. The process is killed after its last step, before it saves."""
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)

    def lines() -> list[Line]:
        text = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and '"loss"' in line]

    compiled = {"torch_compile": "compiled" in case.variant} if case.method == "sft" else {}
    train = {"micro_batch_size": case.micro, "profile": "profile" in case.variant, **compiled}
    recipe = given.write_recipe(size, case.method, work, folder, {"train": train})
    command = [sys.executable, "-m", "nesso_tune", "train", str(recipe)]
    given.run(command, recipe, settings, seconds, lambda: any(line["step"] >= size.steps for line in lines()))
    manifest = json.loads((folder / "manifest.json").read_text())
    if trace := next(iter(folder.glob("profile/*.json.gz")), None):
        return {"profile": profile(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])}
    return {"lines": lines(), "memory": lines()[-1]["peak_memory_gb"], "attention": manifest["attention"],
            "micro": manifest.get("micro_batch", case.micro)}  # fmt: skip


def profile(events: list[Line]) -> str:
    """What the device did in the profiled steps, as Markdown; of a CPU, its operators, which contain each other."""
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events = on_gpu or [e for e in events if e.get("cat") == "cpu_op"]
    busy, seen, names = Counter(), Counter(), Counter()
    for event in events:
        kind = next((kind for word, kind in KERNELS.items() if word in event["name"].lower()), "other")
        busy[kind], seen[kind] = busy[kind] + event["dur"], seen[kind] + 1
        names[event["name"][:90].replace("|", "/")] += event["dur"]
    total = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    rows = [(f"all {kind}", seen[kind], us) for kind, us in busy.most_common()]
    rows += [(f"`{name}`", "", us) for name, us in names.most_common(10)]
    head = f"Profile of {total / 1e3:.0f} ms:\n\n| kernels | number | ms | share of time |\n|---|---|---|---|"
    return "\n".join([head, *(f"| {name} | {n} | {us / 1e3:.1f} | {us / total:.1%} |" for name, n, us in rows)])


def figures(found: Line, size: Size, facts: Line, method: str) -> Line:
    """Speed between two log lines, for the workload that both sides share."""
    at = {line["step"]: line["seconds"] for line in found["lines"]}
    seconds, per_step = at[size.steps] - at[size.first], facts["work"][method][size.first :]
    tokens, needed, common = (sum(column) / seconds for column in zip(*per_step, strict=True))
    return {**found, "step": seconds / len(per_step), "tokens": tokens, "needed": needed, "common": common}


def table(results: dict[Case, Line], facts: Line, left: dict[Case, str]) -> str:
    """The Markdown document of all results so far."""
    peak, rows = facts["peak"], []
    head = ("case", "step, s", "tokens/s", "MFU, needed FLOPs", "MFU, common count", "memory, GB", "first loss",
            "attention", "speed / fastest TRL")  # fmt: skip
    for case, line in sorted(results.items(), key=lambda item: (item[0].method != "sft", item[0].side)):
        if "tokens" not in line:
            rows.append([str(case), line.get("error", "see below"), *[""] * 7])
            continue
        rivals = [r.get("tokens", 0) for c, r in results.items() if (c.method, c.side) == (case.method, "TRL")]
        rates = [f"{x / peak:.1%}" if peak else f"{x / 1e12:.3g} TFLOP/s" for x in (line["needed"], line["common"])]
        rows.append([f"{case}" + (f" ({line['micro']})" if case.micro == "auto" else ""), f"{line['step']:.3f}",
                     f"{line['tokens']:,.0f}", *rates, f"{line['memory']:.1f}", f"{line['lines'][0]['loss']:.4f}",
                     line["attention"], f"{line['tokens'] / max(rivals):.2f}" if any(rivals) else ""])  # fmt: skip
    title = f"{facts['machine']}; bfloat16 peak {f'{peak / 1e12:g} TFLOP/s' if peak else 'unknown'}"
    after = [line["profile"] for line in results.values() if "profile" in line]
    after += [f"Left out: {case}: {why}" for case, why in left.items()]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    return "\n\n".join([title, lines, *after]) + "\n"


def measure(options: argparse.Namespace, size: Size, work: Path, end: float) -> dict[Case, Line]:
    """Measures the cases until the time is up, and writes the table after each."""
    settings = environment(work, options.wheels)
    given.write_data(size, work)

    def child(kind: str, seconds: float, *words: str) -> Line:
        command = [sys.executable, __file__, "--child", kind, json.dumps(asdict(size)), str(work), *words]
        return dict(json.loads(given.run(command, work / kind, settings, seconds).splitlines()[-1]))

    facts, results, left = child("setup", end - time.monotonic()), {}, {}
    for case in (case for case in CASES if options.only in str(case) and not (options.toy and case in NOT_IN_TOY)):
        sft = [c for c, line in results.items() if (c.method, c.side) == ("sft", "nesso-tune") and "tokens" in line]
        seconds = min(end - time.monotonic(), end if options.toy else CASE_LIMIT_S)
        if case.micro == "auto" and not facts["auto"]:
            left[case] = "this version has no train.micro_batch_size: auto"
        elif seconds < SHORTEST_S or (case.micro == "best" and not sft):
            left[case] = "no time" if seconds < SHORTEST_S else "no SFT case succeeded"
        else:
            print(f"{end - time.monotonic():4.0f} s left: {case}", file=sys.stderr, flush=True)
            best = max(sft, key=lambda one: results[one]["tokens"], default=case)
            real = replace(best, variant=(*best.variant, *case.variant)) if case.micro == "best" else case
            try:
                found = ours(real, size, work, settings, seconds) if case.side != "TRL" else child(
                    "trl", seconds, json.dumps(asdict(case)))  # fmt: skip
                results[real] = found if "profile" in found else figures(found, size, facts, case.method)
            except Failed as error:
                results[real] = {"error": f"failed: {error}".replace("|", "/")[:160]}
        (options.folder / "table.md").write_text(table(results, facts, left), encoding="utf-8")
    print(table(results, facts, left))
    return results


def main() -> None:
    """Runs the cases that fit into the time, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "outputs" / "gpu-benchmark")
    parser.add_argument("--wheels", type=Path, help="the folder that gpu_wheels.py wrote")
    parser.add_argument("--toy", action="store_true", help="a tiny model; also on a CPU")
    parser.add_argument("--minutes", type=float, default=9.5, help="no case runs longer than this after the start")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    options = parser.parse_args()
    end, size = time.monotonic() + 60 * options.minutes, given.TOY if options.toy else given.ZAGREUS
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = measure(options, size, Path(folder), end)
    sys.exit(any("error" in line for line in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, workload, place = {"setup": setup, "trl": trl}[sys.argv[2]], Size(**json.loads(sys.argv[3])), sys.argv[4]
        print(json.dumps(kind(workload, Path(place), *sys.argv[5:])), flush=True)
    else:
        main()
