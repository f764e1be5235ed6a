"""Several processes give the results of one: FSDP2 and DDP on gloo, the same rows per step, compatible checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from nesso_tune import RecipeError, load_recipe
from nesso_tune.run import train
from nesso_tune.training.trainer import BaseTrainer
from tests.support.gradients import clip_and_save
from tests.support.runs import BASE, metrics, recipe, several, steps, thorough, write_recipe


def base_of(folder, tied):
    """A base with random weights on disk, with tied or untied embeddings."""
    shutil.copytree(BASE, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return {"base": str(folder), "random_init": False}


# name: method, processes, micro_batch_size, `distributed` section, tied embeddings of a new base, other sections
FULL, SHARDS, DDP = {"fsdp": "full_shard"}, {"fsdp": "full_shard", "state_dict": "sharded"}, {"fsdp": "none"}
HYBRID = {"fsdp": "hybrid_shard", "state_dict": "sharded"}  # two processes on each node
LORA = {"adapter": {"type": "lora", "r": 4}}
DORA = {"adapter": {"type": "dora", "r": 4}}
QLORA = {"adapter": {"type": "qlora", "r": 4}}
EIGHT_BIT = {"train": {"optimizer": "adamw_8bit"}}
WITH_SFT = {"dpo": {"loss": {"sigmoid": 1.0, "sft": 0.5}}}
CASES = {
    "sft": ("sft", 2, 2, FULL, None, {}),
    "sft, untied": ("sft", 2, 2, FULL, False, {}),
    "sft, shards on four": ("sft", 4, 1, SHARDS, None, {}),
    "sft, hybrid, on two nodes": ("sft", 4, 1, HYBRID, True, {}),
    "dpo, hybrid, full checkpoints": ("dpo", 4, 2, {"fsdp": "hybrid_shard"}, None, WITH_SFT),
    "sft, DDP": ("sft", 2, 2, DDP, None, {}),
    "sft, recomputed": ("sft", 2, 2, FULL, None, {"train": {"gradient_checkpointing": True}}),
    "sft, adapter": ("sft", 2, 2, FULL, True, {"model": LORA}),
    "sft, adapter, untied, shards on four": ("sft", 4, 1, SHARDS, False, {"model": LORA}),
    "sft, dora, recomputed": ("sft", 2, 2, FULL, True, {"model": DORA, "train": {"gradient_checkpointing": True}}),
    "sft, dora, DDP": ("sft", 2, 2, DDP, True, {"model": DORA}),
    "sft, qlora": ("sft", 2, 2, {"fsdp": "auto"}, True, {"model": QLORA}),
    "sft, 8 bits": ("sft", 2, 2, {"fsdp": "auto"}, None, {"train": {"optimizer": "adamw_8bit"}}),
    "dpo, dora, untied, shards": ("dpo", 2, 2, SHARDS, False, {"model": DORA, **WITH_SFT}),
    "dpo": ("dpo", 2, 2, SHARDS, None, WITH_SFT),
    "dpo, on four": ("dpo", 4, 2, FULL, None, {}),
    "dpo, DDP": ("dpo", 2, 2, DDP, None, {}),
    "dpo, adapter": ("dpo", 2, 2, FULL, True, {"model": LORA}),
}


# run by hand: other cases cover their parts
BY_HAND = ("sft", "dpo", "sft, 8 bits", "sft, recomputed", "sft, qlora", "sft, DDP", "sft, adapter", "sft, untied",
           "sft, shards on four", "sft, adapter, untied, shards on four", "dpo, on four", "dpo, DDP",
           "dpo, adapter", "dpo, hybrid, full checkpoints", "sft, dora, recomputed", "sft, dora, DDP")  # fmt: skip


@pytest.mark.parametrize(
    ("method", "processes", "micro", "sharing", "tied", "sections"),
    [pytest.param(*case, id=name, marks=thorough if name in BY_HAND else ()) for name, case in CASES.items()],
)
def test_several_processes_equal_one(tmp_path, request, monkeypatch, method, processes, micro, sharing, tied, sections):
    """Losses within 1e-5, the first gradients within 1e-6 of their norm, final weights within 1e-4."""
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    model = {**(base_of(tmp_path / "base", tied) if tied is not None else {}), **sections.get("model", {})}
    # e.g. accumulation 4 on one process is 2 on two
    batch = {"micro_batch_size": micro, "global_batch_size": 8, "gradient_accumulation_steps": None}
    for name in ("one", "several"):
        some = recipe(method, tmp_path / name, [source], distributed=sharing, data={"validation_size": 3},
                      train={**batch, **sections.get("train", {})}, model=model,
                      **{key: value for key, value in sections.items() if key == "dpo"})  # fmt: skip
        file = str(tmp_path / f"{name}.gradients")
        if name == "one":
            monkeypatch.setattr(BaseTrainer, "_clip_grad_norm", clip_and_save)
            monkeypatch.setenv("FIRST_GRADIENTS", file)
            train(some)
            continue
        path = write_recipe(tmp_path / "several.yaml", some)
        nodes = [{"LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2} for rank in range(processes)]
        done = several(
            "train", path, module="tests.support.recording", processes=processes, FIRST_GRADIENTS=file,
            own=nodes if sharing["fsdp"] == "hybrid_shard" else None,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, both = tmp_path / "one", tmp_path / "several"
    keys = ("loss", "loss/it", "eval_loss", "eval_loss/en", "tokens", "supervised_tokens", "stop_rate", "exact_match")
    for key in keys:
        assert len(steps(one, key)) in (2, 4), key
        assert steps(both, key) == pytest.approx(steps(one, key), abs=1e-5), key
    answers = [[line for line in metrics(run) if line.get("event") in ("answer", "parent")] for run in (one, both)]
    assert answers[0] == answers[1]
    assert len([line for line in answers[0] if line["event"] == "parent"]) == (method == "dpo")
    check_gradients(*(load_file(f"{run}.gradients") for run in (one, both)))
    a, b = (load_file(run / "final" / "model.safetensors") for run in (one, both))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-4)
    check_files(one / "checkpoint-4", both / "checkpoint-4", sharing, processes)
    shares = {json.loads(file.read_text())["supervised_tokens"] for file in both.glob("checkpoint-4/counters-*.json")}
    assert len(shares) == processes, "ranks have different numbers of supervised tokens"


def check_gradients(one, several):
    assert set(one) == set(several), "the same weights are trained"
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    assert norm > 1e-3
    apart = torch.stack([(several[name] - one[name]).norm() for name in one]).norm()
    assert apart < 1e-6 * norm


def check_files(alone, checkpoint, sharing, processes):
    """Checkpoints have canonical names, full or sharded."""
    weights = set(load_file(alone / "model.safetensors"))
    if sharing.get("state_dict") == "sharded":
        shards = sorted(checkpoint.glob("shard-*.safetensors"))
        assert len(shards) == processes
        assert not (checkpoint / "model.safetensors").exists()
        assert {name for shard in shards for name in load_file(shard) if "|" not in name} == weights
    else:
        assert set(load_file(checkpoint / "model.safetensors")) == weights


def test_a_chain_on_two_processes_equals_that_on_one(tmp_path, talks, pairs):
    """SFT, then DPO from its result, in one command: each run has its own process group."""
    for name, accumulated in (("one", 2), ("two", 1)):
        batch = {"micro_batch_size": 2, "max_steps": 2, "gradient_accumulation_steps": accumulated}
        sft = recipe("sft", tmp_path / name / "sft", [talks], distributed=FULL, train=batch, evaluation=None)
        base = {"base": str(tmp_path / name / "sft" / "final"), "random_init": False}
        dpo = recipe("dpo", tmp_path / name / "dpo", [pairs], distributed=FULL, train=batch, model=base,
                     evaluation=None)  # fmt: skip
        if name == "one":
            train(sft)
            train(dpo)
            continue
        paths = [write_recipe(tmp_path / f"{name}-{some.method}.yaml", some) for some in (sft, dpo)]
        done = several("train", *paths)
        assert done.returncode == 0, done.stderr[-3000:]
    for method in ("sft", "dpo"):
        assert steps(tmp_path / "two" / method) == pytest.approx(steps(tmp_path / "one" / method), abs=1e-5)
    shutil.rmtree(tmp_path / "two" / "sft" / "final")  # as if killed; one process would continue with 2
    with pytest.raises(RecipeError, match=r"the global batch changed \(4 -> 2\)"):
        train(load_recipe(paths[0]))


def test_bfloat16_does_not_round_log_probabilities_or_gradient_sums(tmp_path, pairs):
    """accelerate's mixed-precision policy does: log-probabilities differ by 0.2, the loss by 0.005."""
    batch = {"micro_batch_size": 4, "global_batch_size": 8, "max_steps": 1, "gradient_accumulation_steps": None}
    for name in ("one", "two"):
        some = recipe("dpo", tmp_path / name, [pairs], distributed=FULL, train=batch, evaluation=None,
                      model={"dtype": "bfloat16"})  # fmt: skip
        if name == "one":
            train(some)
            continue
        done = several("train", write_recipe(tmp_path / f"{name}.yaml", some))
        assert done.returncode == 0, done.stderr[-3000:]
    for key, within in (("logps/chosen", 0.02), ("logps/rejected", 0.02), ("grad_norm", 0.01), ("loss", 0.001)):
        value = torch.tensor(steps(tmp_path / "two", key)[1])
        assert value == pytest.approx(steps(tmp_path / "one", key)[1], abs=within), key
        assert value != value.bfloat16(), key
    masters = load_file(tmp_path / "two" / "checkpoint-1" / "model.safetensors")
    assert {weight.dtype for weight in masters.values()} == {torch.float32}


@pytest.mark.parametrize(
    "sections",
    [pytest.param({"model": QLORA}, id="4-bit"), pytest.param(EIGHT_BIT, id="8-bit")],
)
@thorough  # on one process: tests/training/test_eight_bit.py, tests/training/test_adapters.py
def test_what_cannot_be_sharded_is_resumed_with_the_same_bits(tmp_path, talks, sections):
    """Each process holds the whole 4-bit base, or all 8-bit moments (DDP)."""
    model = {**base_of(tmp_path / "base", tied=False), **sections.get("model", {})}
    run = tmp_path / "run"
    some = recipe("sft", run, [talks], model=model, **{k: v for k, v in sections.items() if k != "model"})
    path = write_recipe(tmp_path / "r.yaml", some)
    assert several("train", path).returncode == 0
    whole = (run / "final" / "model.safetensors").read_bytes()
    moments = load_file(run / "checkpoint-4" / "optimizer.safetensors")
    assert (torch.uint8 in {tensor.dtype for tensor in moments.values()}) == ("train" in sections)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")
    done = several("train", path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in {line.get("event") for line in metrics(run)}
    assert (run / "final" / "model.safetensors").read_bytes() == whole
    again = load_file(run / "checkpoint-4" / "optimizer.safetensors")
    assert set(again) == set(moments)
    assert all(torch.equal(again[name], value) for name, value in moments.items())


@thorough
@pytest.mark.parametrize("fsdp", ["full_shard", "none"])
def test_a_frozen_base_in_bfloat16_is_sharded_beside_trained_weights_in_float32(tmp_path, talks, fsdp):
    batch = {"micro_batch_size": 2, "global_batch_size": 8, "max_steps": 2, "gradient_accumulation_steps": None}
    model = {**base_of(tmp_path / "base", tied=True), **LORA, "dtype": "bfloat16"}
    for name in ("one", "two"):
        some = recipe("sft", tmp_path / name, [talks], distributed={"fsdp": fsdp}, train=batch, evaluation=None,
                      model=model)  # fmt: skip
        if name == "one":
            train(some)
            continue
        done = several("train", write_recipe(tmp_path / f"{name}.yaml", some))
        assert done.returncode == 0, done.stderr[-3000:]
    assert steps(tmp_path / "two")[1] == pytest.approx(steps(tmp_path / "one")[1], abs=1e-3)
    assert steps(tmp_path / "two", "grad_norm")[1] == pytest.approx(steps(tmp_path / "one", "grad_norm")[1], rel=0.02)
    one, two = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("one", "two"))
    assert {weight.dtype for weight in two.values()} == {torch.float32}
    assert set(one) == set(two)
    manifest = json.loads((tmp_path / "two" / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["frozen_weights"] == "bfloat16"


def test_full_shard_never_falls_back_to_ddp(tmp_path, talks):
    """Without FSDP on CPU, accelerate silently falls back to DDP: the run must stop."""
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    some = recipe("sft", tmp_path / "run", [talks], distributed={"fsdp": "full_shard"}, train=batch)
    done = several("train", write_recipe(tmp_path / "some.yaml", some), module="nesso_tune")
    assert done.returncode != 0
    assert "full_shard is set, but the weights are not sharded" in done.stderr


@thorough
@pytest.mark.parametrize(("method", "samples"), [("sft", 3), ("dpo", 1)])
def test_prompts_are_shared_and_weights_gathered_once_for_all_answers(tmp_path, request, method, samples):
    """Answers and training are those of one process, and of weights that are gathered layer by layer."""
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    batch = {"micro_batch_size": 2, "global_batch_size": 8, "gradient_accumulation_steps": None}
    evaluation = {"every_steps": 2, "samples": samples, "max_new_tokens": 8}
    counts = {}
    for name in ("one", "once", "layers"):
        some = recipe(method, tmp_path / name, [source], distributed=FULL, data={"validation_size": 4}, train=batch,
                      evaluation=evaluation)  # fmt: skip
        if name == "one":
            train(some)
            continue
        told = {"ALL_GATHERS": str(tmp_path / f"{name}.txt"), **({"LAYER_BY_LAYER": "1"} if name == "layers" else {})}
        path = write_recipe(tmp_path / f"{name}.yaml", some)
        done = several("train", path, module="tests.support.all_gathers", **told)
        assert done.returncode == 0, done.stderr[-3000:]
        counts[name] = [int(line) for line in (tmp_path / f"{name}.txt").read_text().split()]
    answers = {name: [line for line in metrics(tmp_path / name) if line.get("event") in ("answer", "parent")]
               for name in ("one", "once", "layers")}  # fmt: skip
    assert answers["once"] == answers["layers"] == answers["one"]
    assert len(answers["one"]) >= 2 * samples
    units = LlamaConfig.from_pretrained(BASE).num_hidden_layers + 1  # and the root
    assert all(count <= units for count in counts["once"]), counts
    assert all(count > 4 * units for count in counts["layers"]), counts
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("once", "layers")]
    assert weights[0] == weights[1], "training goes on with the same bits"
