"""Several processes give what one gives: FSDP2 on gloo, the same rows in the same steps, files that either reads."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nesso_tune import RecipeError, load_recipe
from nesso_tune.run import train
from tests.support.runs import BASE, ROOT, metrics, recipe, steps, write_recipe


def several(*arguments, module="tests.support.fsdp_on_cpu", processes=2, **variables):
    """Runs the command line on two CPU processes, or on another number of them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=localhost:0", "-m", module]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **fixed, **variables}
    return subprocess.run(
        [*torchrun, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def base_of(folder, tied):
    """A base with (random) weights of its own, its embeddings tied to the head or not."""
    shutil.copytree(BASE, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return {"base": str(folder), "random_init": False}


# name: method, processes, rows of a process at a time and sections of both recipes; "tied": of a base made for it
FULL, SHARDS, DDP = {"fsdp": "full_shard"}, {"fsdp": "full_shard", "state_dict": "sharded"}, {"fsdp": "none"}
LORA = {"adapter": {"type": "lora", "r": 4}}
CASES = {
    "sft": ("sft", 2, 2, FULL, None, {}),
    "sft, untied": ("sft", 2, 2, FULL, False, {}),
    "sft, shards on four": ("sft", 4, 1, SHARDS, None, {}),
    "sft, DDP": ("sft", 2, 2, DDP, None, {}),
    "sft, recomputed": ("sft", 2, 2, FULL, None, {"train": {"gradient_checkpointing": True}}),
    "sft, adapter": ("sft", 2, 2, FULL, True, {"model": LORA}),
    "sft, adapter, untied, shards on four": ("sft", 4, 1, SHARDS, False, {"model": LORA}),
    "dpo": ("dpo", 2, 2, SHARDS, None, {}),
    "dpo, on four": ("dpo", 4, 2, FULL, None, {}),
    "dpo, DDP": ("dpo", 2, 2, DDP, None, {}),
    "dpo, adapter": ("dpo", 2, 2, FULL, True, {"model": LORA}),
}


@pytest.mark.parametrize(("method", "processes", "micro", "sharing", "tied", "sections"), CASES.values(), ids=CASES)
def test_several_processes_equal_one(tmp_path, request, method, processes, micro, sharing, tied, sections):
    """Losses within 1e-5, the first gradients within 1e-6 of their norm, final weights within 1e-4."""
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    model = {**(base_of(tmp_path / "base", tied) if tied is not None else {}), **sections.get("model", {})}
    # e.g. accumulation 4 on one process is 2 on two
    batch = {"micro_batch_size": micro, "global_batch_size": 8, "gradient_accumulation_steps": None}
    for name, number in (("one", 1), ("several", processes)):
        train_section = {**batch, **sections.get("train", {})}
        some = recipe(method, tmp_path / name, [source], distributed=sharing, data={"validation_size": 3},
                      train=train_section, model=model)  # fmt: skip
        done = several(
            "train", write_recipe(tmp_path / f"{name}.yaml", some), module="tests.support.recording",
            processes=number, FIRST_GRADIENTS=str(tmp_path / f"{name}.gradients"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, both = tmp_path / "one", tmp_path / "several"
    keys = ("loss", "loss/it", "eval_loss", "eval_loss/en", "tokens", "supervised_tokens", "stop_rate", "exact_match")
    for key in keys:
        assert len(steps(one, key)) in (2, 4), key
        assert steps(both, key) == pytest.approx(steps(one, key), abs=1e-5), key
    answers = [[line for line in metrics(run) if line.get("event") == "answer"] for run in (one, both)]
    assert answers[0] == answers[1]
    check_gradients(*(load_file(f"{run}.gradients") for run in (one, both)))
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, both))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-4)
    check_files(one / "checkpoint-4", both / "checkpoint-4", sharing, processes)
    shares = {json.loads(file.read_text())["supervised_tokens"] for file in both.glob("checkpoint-4/counters-*.json")}
    assert len(shares) == processes, "the processes learn from different numbers of tokens"


def check_gradients(one, several):
    assert set(one) == set(several), "the same weights are trained"
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    assert norm > 1e-3
    apart = torch.stack([(several[name] - one[name]).norm() for name in one]).norm()
    assert apart < 1e-6 * norm


def check_files(alone, checkpoint, sharing, processes):
    """Canonical names, whole or in shards."""
    weights = set(load_file(alone / "model.safetensors"))
    if sharing is SHARDS:
        shards = sorted(checkpoint.glob("shard-*.safetensors"))
        assert len(shards) == processes
        assert not (checkpoint / "model.safetensors").exists()
        assert {name for shard in shards for name in load_file(shard) if "|" not in name} == weights
    else:
        assert set(load_file(checkpoint / "model.safetensors")) == weights


def test_a_chain_on_two_processes_is_that_on_one(tmp_path, talks, pairs):
    """SFT, then DPO from its result, in one command: the second forms a process group of its own."""
    batch = {"micro_batch_size": 2, "global_batch_size": 4, "max_steps": 2, "gradient_accumulation_steps": None}
    for name, processes in (("one", 1), ("two", 2)):
        sft = recipe("sft", tmp_path / name / "sft", [talks], distributed=FULL, train=batch, evaluation=None)
        base = {"base": str(tmp_path / name / "sft" / "final"), "random_init": False}
        dpo = recipe("dpo", tmp_path / name / "dpo", [pairs], distributed=FULL, train=batch, model=base,
                     evaluation=None)  # fmt: skip
        paths = [write_recipe(tmp_path / f"{name}-{some.method}.yaml", some) for some in (sft, dpo)]
        done = several("train", *paths, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for method in ("sft", "dpo"):
        assert steps(tmp_path / "two" / method) == pytest.approx(steps(tmp_path / "one" / method), abs=1e-5)


def test_bfloat16_rounds_no_log_probabilities_and_no_sums_of_gradients(tmp_path, pairs):
    """Accelerate's own policy would: answers were off by 0.2, one step's loss by 0.005."""
    batch = {"micro_batch_size": 4, "global_batch_size": 8, "max_steps": 1, "gradient_accumulation_steps": None}
    for name, processes in (("one", 1), ("two", 2)):
        some = recipe("dpo", tmp_path / name, [pairs], distributed=FULL, train=batch, evaluation=None,
                      model={"dtype": "bfloat16"})  # fmt: skip
        done = several("train", write_recipe(tmp_path / f"{name}.yaml", some), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    for key, within in (("logps/chosen", 0.02), ("logps/rejected", 0.02), ("grad_norm", 0.01), ("loss", 0.001)):
        value = torch.tensor(steps(tmp_path / "two", key)[1])
        assert value == pytest.approx(steps(tmp_path / "one", key)[1], abs=within), key
        assert value != value.bfloat16(), key
    masters = load_file(tmp_path / "two" / "checkpoint-1" / "model.safetensors")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}


def test_full_shard_that_would_quietly_be_something_else_stops(tmp_path, talks):
    """Without the promotion accelerate falls back to DDP on CPU: the run must not go on as if nothing were."""
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    some = recipe("sft", tmp_path / "run", [talks], distributed={"fsdp": "full_shard"}, train=batch)
    done = several("train", write_recipe(tmp_path / "some.yaml", some), module="nesso_tune")
    assert done.returncode != 0
    assert "full_shard was asked for" in done.stderr


def rows_read(file):
    return [int(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "first", "second", "state"),
    [("sft", 2, 1, "sharded"), ("sft", 1, 2, "sharded"), ("sft", 2, 2, "sharded"), ("sft", 2, 4, "sharded"),
     ("dpo", 2, 1, "full"), ("dpo", 1, 2, "full"), ("dpo", 2, 2, "full")],
)  # fmt: skip
def test_a_run_goes_on_at_another_number_of_processes(tmp_path, request, method, first, second, state):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "gradient_accumulation_steps": None}
    sections = {"train": {**batch, "max_steps": 6}, "checkpoint": {"every_steps": 3}, "evaluation": {"every_steps": 2},
                "distributed": {"state_dict": state}}  # fmt: skip
    whole = recipe(method, tmp_path / "whole", [source], **sections)
    train(whole)
    path = write_recipe(tmp_path / "r.yaml", recipe(method, tmp_path / "run", [source], **sections))
    final, finals = tmp_path / "run" / "final" / "model.safetensors", []
    logs = [tmp_path / name for name in ("first", "second")]
    for log, processes in zip(logs, (first, second), strict=True):
        done = several("train", path, module="tests.support.recording", processes=processes, ROWS_READ=str(log))
        assert done.returncode == 0, done.stderr[-3000:]
        finals.append(load_file(final))
        if log == logs[0]:  # as if it had been killed after step 3
            shutil.rmtree(tmp_path / "run" / "final")
            shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert sorted(rows_read(logs[0])) == list(range(24)), "each row of the run once"
    assert sorted(rows_read(logs[1])) == list(range(12, 24)), "none twice, none left out"
    resumed = next(line for line in metrics(tmp_path / "run") if line.get("event") == "resumed")
    assert resumed.get("processes", [first, second]) == [first, second]
    for key in ("loss", "loss/it", "eval_loss", "tokens", "supervised_tokens", "learning_rate"):
        assert steps(tmp_path / "run", key) == pytest.approx(steps(tmp_path / "whole", key), abs=1e-5), key
    for name, weight in finals[0].items():  # to the bit where nothing else changed
        torch.testing.assert_close(finals[1][name], weight, rtol=0, atol=0 if first == second else 1e-4)


def test_another_global_batch_is_refused(tmp_path, talks):
    batch = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    some = recipe("sft", tmp_path / "run", [talks], train={**batch, "max_steps": 4})
    path = write_recipe(tmp_path / "r.yaml", some)
    assert several("train", path).returncode == 0
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(RecipeError, match=r"the global batch changed \(4 -> 2\)"):
        train(load_recipe(path))
