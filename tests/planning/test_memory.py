"""The memory estimate, against what torch really keeps; GPUs by name; what follows from the two."""

import json
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.errors import RecipeError
from nesso_tune.model.adapters import adapt, lora_config, quantise
from nesso_tune.model.attention import AttentionSpans, enable_document_attention, last_hidden_states
from nesso_tune.planning.hardware import GIB, GPUS, NO_MPS, Gpu, find_gpu, has_apple_gpu
from nesso_tune.planning.memory import (
    MEMORY_SAFE_SHARE,
    adapter_parameters,
    checkpoint_bytes,
    dora_activations,
    dora_working,
    estimate_memory,
    frozen_bytes,
    layer_activations,
)
from nesso_tune.planning.plan import DataVolume, World, describe
from nesso_tune.planning.planner import make_plan
from nesso_tune.planning.shapes import ModelShape, known_config, shape_of
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.sections import LoraSection, ModelSection
from tests.support.recipe_texts import DPO, SFT, read
from tests.support.runs import BASE, ROOT, main_here, thorough

ZAGREUS, EIGHT = (shape_of(known_config(base)) for base in ("mii-llm/zagreus-0.4B-ita", "meta-llama/Llama-3.1-8B"))
SHAPES = {
    "no grouping": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "grouped": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "wide heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
}


def kept(config, layers, tokens, bfloat16, adapter=None):
    """Bytes that autograd keeps of a forward pass, weights aside."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"num_hidden_layers": layers})).train()
    assert enable_document_attention(model, "sdpa")
    if adapter is not None:
        dtype = "bfloat16" if bfloat16 else "float32"
        adapt(model, ModelSection(base="b", dtype=dtype, adapter=adapter), [], seed=0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        segments = AttentionSpans.from_documents([tokens // 2, tokens // 2])
        last_hidden_states(model, torch.ones(1, tokens, dtype=torch.long), segments)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_a_layer_keeps_what_is_counted(sizes, bfloat16):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 320, **sizes}

    def of_a_layer(tokens):
        return (kept(config, 3, tokens, bfloat16) - kept(config, 1, tokens, bfloat16)) / 2

    a_token = (of_a_layer(512) - of_a_layer(256)) / 256  # what depends on the tokens: the weights' casts do not
    shape = shape_of(config | {"num_hidden_layers": 1})
    assert layer_activations(shape, bfloat16) == pytest.approx(a_token, rel=0.02)


def memory(shape=ZAGREUS, text=SFT, shards=1, micro_batch=1, checkpointing=False):
    return estimate_memory(
        read(text), shape, shards=shards, micro_batch=micro_batch, checkpointing=checkpointing, on_gpu=True
    )


def test_the_state_is_sixteen_bytes_a_weight_and_is_shared_when_sharded():
    assert memory().state == 16 * ZAGREUS.parameters
    assert memory(shards=8).state == 2 * ZAGREUS.parameters
    for fsdp, shards in (("full_shard", 8), ("none", 1)):
        made = plan("max_steps: 9", text=f"{SFT}distributed: {{fsdp: {fsdp}}}\n", processes=8)
        assert (made.shards, made.memory.state) == (shards, 16 * ZAGREUS.parameters // shards)
    assert made.memory.working == memory().working + 4 * ZAGREUS.parameters, "DDP has buckets of gradients"


def test_activations_grow_with_tokens_and_shrink_with_checkpointing():
    one, four = memory().activations, memory(micro_batch=4).activations
    assert four == 4 * one
    assert memory(checkpointing=True).activations < one / 5
    assert memory(text=DPO.replace("data:", "data:\n  sequence_len: 4096")).activations == 2 * one


def test_the_whole_logits_are_never_there():
    many = memory(micro_batch=64)
    assert many.logits < 64 * 4096 * ZAGREUS.vocab_size * 2 / 20
    assert memory(shape=EIGHT).logits > memory().logits


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_what_peft_makes(kind):
    config = known_config("mii-llm/zagreus-0.4B-ita") | {"num_hidden_layers": 2}
    for targets in ("all-linear", ("q_proj", "v_proj"), ("down_proj",)):
        section = LoraSection(type=kind, r=8, target_modules=targets)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            adapted = get_peft_model(model, lora_config(section, model, []))
        assert adapter_parameters(section, shape_of(config)) == adapted.get_nb_trainable_parameters()[0]


def test_adapters_need_less_than_all_weights_and_four_bits_less_than_thirty_two():
    whole, lora, dora, qlora = (
        memory(EIGHT, SFT if kind is None else SFT.replace("base: b", f"base: b, adapter: {{type: {kind}}}"))
        for kind in (None, "lora", "dora", "qlora")
    )
    assert lora.state < whole.state / 3
    assert dora.state > lora.state
    assert dora.activations > 1.5 * lora.activations
    assert dora.working > lora.working
    assert qlora.activations == lora.activations
    trained = 16 * adapter_parameters(LoraSection(), EIGHT)
    layers, tables = 32 * (EIGHT.layer_parameters - 2 * EIGHT.hidden_size), 2 * EIGHT.embedding_parameters
    assert qlora.state - trained - tables == pytest.approx(layers * 4.127 / 8, rel=1e-3), "bits a weight, as published"
    assert qlora.state < lora.state / 2
    assert lora.state == 2 * EIGHT.parameters + trained, "the base is held in the precision of computation"
    assert lora.working < whole.working / 3, "nothing else is kept in compute precision"
    exact = SFT.replace("base: b", "base: b, dtype: float32, adapter: {type: lora}")
    assert memory(EIGHT, exact).state == 4 * EIGHT.parameters + trained


def test_a_base_in_four_bits_is_as_large_as_counted():
    config = {"model_type": "llama", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512,
              "num_attention_heads": 4, "num_hidden_layers": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    quantise(model, torch.float32)
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "compute_dtype")]
    scales = sum(tensor.nbytes for state in states for tensor in (state.absmax, state.state2.absmax))
    held = scales + sum(parameter.nbytes for parameter in model.parameters())
    assert frozen_bytes(LoraSection(type="qlora"), shape_of(config)) == pytest.approx(held, rel=1e-3)


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_a_layer_with_an_adapter_keeps_what_is_counted(kind, bfloat16):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 320,
              **SHAPES["grouped"]}  # fmt: skip
    section = LoraSection(type=kind, r=8)

    def of_a_layer(tokens):
        return (kept(config, 3, tokens, bfloat16, section) - kept(config, 1, tokens, bfloat16, section)) / 2

    a_token, shape = (of_a_layer(512) - of_a_layer(256)) / 256, shape_of(config | {"num_hidden_layers": 1})
    counted = layer_activations(shape, bfloat16)
    counted += dora_activations(section, shape, bfloat16) if kind == "dora" else 0
    assert a_token <= counted <= 1.2 * a_token


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_dora_takes_what_is_counted_to_measure_its_outputs(bfloat16):
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024,
              "num_attention_heads": 4, "num_hidden_layers": 1}  # fmt: skip
    more = peak(config, "dora", bfloat16) - peak(config, "lora", bfloat16)
    assert more == pytest.approx(dora_working(shape_of(config), bfloat16), rel=0.05)


def peak(config, kind, bfloat16):
    """The most bytes that one token's step holds at a time, weights aside."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    dtype = "bfloat16" if bfloat16 else "float32"
    adapt(model, ModelSection(base="b", dtype=dtype, adapter=LoraSection(type=kind, r=8)), [], seed=0)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    plain = torch.backends.mkldnn.flags(enabled=False)  # on some CPUs it copies a bfloat16 matrix before it multiplies
    with plain, profile as seen, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        model.model(torch.ones(1, 1, dtype=torch.long), use_cache=False).last_hidden_state.sum().backward()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_the_documented_figures_are_those_of_the_plan():
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \(?`?(\w+)`?\)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) (GB|MB) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["null", "lora", "dora", "qlora"]
    for kind, *sizes, checkpoint, unit in rows:
        adapter = None if kind == "null" else {"type": kind}
        for base, size in zip(("Qwen/Qwen3-1.7B-Base", "meta-llama/Llama-3.1-8B"), sizes, strict=True):
            train = {"train.gradient_checkpointing": True, "train.micro_batch_size": 1}
            some = load_recipe("lora", {**train, "model.base": base, "model.adapter": adapter})
            made = make_plan(some, World(1, find_gpu("a100-80gb")))
            assert f"{made.memory.total / GIB:.1f}" == size
        assert f"{made.checkpoint_bytes / (1e9 if unit == 'GB' else 1e6):.3g}" == checkpoint


def test_gpus_have_names():
    assert find_gpu("a100-64gb").memory == 64 * GIB
    assert find_gpu("A100_80GB").name == "a100-80gb"
    assert find_gpu("h200").name == "h200-141gb"
    assert find_gpu("nvidia-l4").name == "l4-24gb"
    assert not find_gpu("t4").bfloat16
    same = {"4090": "rtx-4090-24gb", "NVIDIA GeForce RTX 4090": "rtx-4090-24gb", "H100-SXM": "h100-80gb",
            "AMD Instinct MI300X": "mi300x-192gb", "NVIDIA A100-SXM4-80GB": "a100-80gb"}  # fmt: skip
    for name, row in same.items():
        found, listed = find_gpu(name), find_gpu(row)
        assert (found.memory, found.teraflops, found.bandwidth) == (listed.memory, listed.teraflops, listed.bandwidth)
    assert find_gpu("H100 PCIe").teraflops == 756
    for name in ("rtx 4090 ti", "h100-nvl", "a100", "NVIDIA RTX 6000"):
        with pytest.raises(RecipeError, match="is not in the table of GPUs"):
            find_gpu(name)
    with pytest.raises(RecipeError, match=r"Apple's GPU \(MPS\) is not supported"):
        find_gpu("mps")
    with pytest.raises(RecipeError, match="use one of a100-40gb, a100-64gb, a100-80gb"):
        find_gpu("a100")
    with pytest.raises(RecipeError, match="did you mean `a100-80gb`"):
        find_gpu("a100-81gb")
    with pytest.raises(RecipeError, match="use one of t4-16gb"):
        find_gpu("zzz")
    assert all(name == name.lower() and name.endswith("gb") for name in GPUS)


def plan(keys="", gpu="a100-80gb", shape=ZAGREUS, processes=1, text=SFT, volume=None):
    device = Gpu("small", gpu * GIB) if isinstance(gpu, int) else find_gpu(gpu)
    return make_plan(read(f"{text}train: {{{keys}}}\n"), World(processes, device), volume, shape)


def test_checkpointing_is_decided_by_the_memory():
    for gpu, expected in ((80, False), (16, True)):
        decided = plan("max_steps: 2000", gpu=gpu)
        assert decided.gradient_checkpointing is expected
        assert (decided.memory.total <= MEMORY_SAFE_SHARE * gpu * GIB) is True
    assert plan("gradient_checkpointing: true").gradient_checkpointing is True
    assert plan("gradient_checkpointing: false", gpu=2).gradient_checkpointing is False
    unknown = make_plan(read(SFT), World(1, find_gpu("l4")), None, None)
    assert unknown.gradient_checkpointing is True, "without a shape the safe way"
    assert make_plan(read(SFT), World(1), None, ZAGREUS).gradient_checkpointing is None


def data(keys):
    """A recipe with a key of `data`."""
    return {"text": SFT.replace("data:", f"data:\n  {keys}")}


SPLIT = "micro_batch_size: 4 with gradient_accumulation_steps: 2"
COLD = "learning_rate: 1.0e-3, max_steps: 90, schedule: {warmup_steps: 0}"
COLD_EIGHT = "learning_rate: 1.0e-5, max_steps: 90, schedule: {warmup_ratio: 0}"
ADVICE = {
    "faster split": ("max_steps: 90, gradient_accumulation_steps: 8", {}, SPLIT),
    "not needed": ("max_steps: 90, gradient_checkpointing: true", {}, "gradient checkpointing is not needed"),
    "too big": ("max_steps: 90", {"shape": EIGHT}, "a step needs about"),
    "adapter": ("max_steps: 90", {"shape": EIGHT, "gpu": "l4"}, "train an adapter"),
    "no bfloat16": ("max_steps: 90", {"gpu": "v100-32gb"}, "has no bfloat16: set model.dtype: float32"),
    "no warm-up": (COLD, {}, "no warm-up"),
    "no warm-up, large": (COLD_EIGHT, {"shape": EIGHT}, "no warm-up"),
    "no end": ("max_steps: 90", data("train_on_eos: none"), "never teaches the model to stop"),
    "no assistant": ("max_steps: 90", data("roles_to_train: [user]"), "the model will not stop"),
    "few held out": ("max_steps: 90", {"volume": DataVolume(900, 9000, 900, 9)}, "only 9 validation rows"),
    "many held out": ("max_steps: 90", {"volume": DataVolume(9 * 10**5, 9**9, 9, 90_000)}, "90,000 validation rows"),
    "none held out": ("max_steps: 90", {"volume": DataVolume(900, 9000, 900, 0), **data("validation_size: 0")},
                      "no validation rows"),
    "little data": ("max_steps: 90", {"volume": DataVolume(9, 900, 90, 1)}, "only 1 validation rows, and the data"),
    "too long": ("max_steps: 90", {"volume": DataVolume(9, 900, 90, 50, dropped={"too_long": 0.9}),
                 **data("sequence_len: 1024")}, "90% of the rows are longer than data.sequence_len 1024 "
                 "and are dropped: raise data.sequence_len, or set data.too_long: truncate"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "more", "words"), ADVICE.values(), ids=ADVICE)
def test_advice(keys, more, words):
    assert words in " / ".join(plan(keys, **more).advice)


BATCH = "global_batch_size: 8, max_steps: 2000"


FOLLOWED = {  # what advice says when the recipe is written another way
    "split of a global batch": (BATCH, {}, "train.micro_batch_size: 4, accumulation becomes 2"),
    "rate, global batch": (BATCH, {}, "or train.global_batch_size: 256"),
    "rate, accumulation": ("gradient_accumulation_steps: 8, max_steps: 2000", {},
                           "or train.gradient_accumulation_steps: 256 (global batch 256)"),
    "rate, a batch that does not fit": ("micro_batch_size: 3, max_steps: 2000", {}, "consider 1.1e-04"),
    "few steps": ("gradient_accumulation_steps: 8, num_epochs: 1", {"volume": DataVolume(80, 8000, 80, 30)},
                  "lower train.gradient_accumulation_steps, or raise train.num_epochs"),
    "warm-up in steps": (COLD, {}, "set train.schedule.warmup_ratio: 0.03 instead of warmup_steps"),
    "state alone too big": ("max_steps: 90", {"shape": EIGHT}, "shard over more GPUs"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "more", "words"), FOLLOWED.values(), ids=FOLLOWED)
def test_advice_can_be_followed_as_it_is_said(keys, more, words):
    assert words in " / ".join(plan(keys, **more).advice)


def test_a_base_that_is_too_large_may_be_held_in_four_bits():
    lora = SFT.replace("base: b", "base: b, adapter: {type: TYPE}")
    for kind, said in (("lora", True), ("dora", True), ("qlora", False)):
        advice = " / ".join(plan("max_steps: 90", gpu=8, shape=EIGHT, text=lora.replace("TYPE", kind)).advice)
        assert ("model.adapter.type: qlora" in advice) is said
    shared = plan("max_steps: 90", gpu=4, shape=EIGHT, text=lora.replace("TYPE", "lora"), processes=2)
    assert "qlora" not in " / ".join(shared.advice), "a sharded base can be shared by more GPUs"


def test_four_bit_weights_and_eight_bit_moments_are_whole_on_every_process():
    four_bits = SFT.replace("base: b", "base: b, adapter: {type: qlora}")
    for keys, text in (("max_steps: 9", four_bits), ("max_steps: 9, optimizer: adamw_8bit", SFT)):
        one, two = (plan(keys, text=text, processes=count) for count in (1, 2))
        assert two.memory.state == one.memory.state, "DDP"
        assert two.memory.working > one.memory.working, "with its buckets of gradients"
        recipe = read(f"{text}train: {{{keys}}}\n")
        assert "replicated on 2 processes (DDP)" in " ".join(describe(two, recipe))
        assert not two.sharded_checkpoints


def test_eight_bit_moments_take_two_bytes_instead_of_eight():
    thirty_two, eight = (plan(f"max_steps: 9, optimizer: {name}") for name in ("adamw_torch_fused", "adamw_8bit"))
    saved = (8 - 2 * (1 + 4 / 256)) * ZAGREUS.parameters
    assert thirty_two.memory.state - eight.memory.state == pytest.approx(saved, rel=1e-6)
    assert thirty_two.checkpoint_bytes - eight.checkpoint_bytes == pytest.approx(saved, rel=1e-6)
    large = " / ".join(plan("max_steps: 9, optimizer: adamw_8bit", shape=EIGHT).advice)
    assert "distributed.fsdp: full_shard with train.optimizer: adamw_torch_fused" in large


def test_no_advice_that_cannot_help():
    said = " / ".join(plan("max_steps: 90", shape=EIGHT).advice)
    assert "sequence_len" not in said, "weights and optimizer alone are too many"
    assert plan("max_steps: 9", gpu=80).advice == (), "someone asked for nine steps"
    random = SFT.replace("base: b", "base: b, random_init: true")
    assert "adapter" not in " / ".join(plan("max_steps: 90", shape=EIGHT, text=random).advice)
    none = DataVolume(1, 0, 0, 0)
    assert plan("max_steps: 5000, learning_rate: 1.0e-3", volume=none).advice, "a volume of nothing is no fault of ours"


QUIET = {
    "a warm-up": "learning_rate: 1.0e-3, max_steps: 90, schedule: {warmup_ratio: 0.03}",
    "a low rate": "learning_rate: 1.0e-5, max_steps: 90, schedule: {warmup_steps: 0}",
    "nothing to split": "max_steps: 90, gradient_accumulation_steps: 1",
    "checkpointing by itself": "max_steps: 90, gradient_checkpointing: auto",
}


@pytest.mark.parametrize("keys", QUIET.values(), ids=QUIET)
def test_no_advice_where_there_is_nothing_to_say(keys):
    assert plan(keys, volume=DataVolume(9000, 9000 * 4000, 900, 1000)).advice == ()


def test_a_split_that_is_proposed_fits_and_keeps_the_batch():
    before = plan("max_steps: 90, gradient_accumulation_steps: 6", gpu=40)
    (text,) = before.advice
    assert "micro_batch_size: 2 with gradient_accumulation_steps: 3" in text
    after = plan("max_steps: 90, micro_batch_size: 2, gradient_accumulation_steps: 3", gpu=40)
    assert after.global_batch == before.global_batch
    assert after.memory.total <= 40 * GIB


def test_on_a_cpu_the_copy_of_a_checkpoint_is_planned():
    def working(checkpoint):
        recipe = load_recipe("quickstart/sft", {"checkpoint": checkpoint})
        return estimate_memory(recipe, shape, shards=1, micro_batch=1, checkpointing=False, on_gpu=False).working

    shape = ModelShape(32_000, 512, 1408, 8, 8, 4, 64, tied=True, context=1024)
    without = working({"asynchronous": False})
    assert working({}) - without == checkpoint_bytes(load_recipe("quickstart/sft"), shape) == 12 * shape.parameters
    assert working(None) == without


@thorough
def test_a_run_on_a_cpu_takes_what_is_planned(tmp_path):
    """Peak resident memory less that before the model is loaded, within 20 %."""
    for file in BASE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
               "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000, "initializer_range": 0.02,
               "max_position_embeddings": 1024}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = BASE.parent / "data" / "conversations.jsonl"
    command = ["-m", "tests.benchmarks.memory", str(tmp_path), "--data", str(data), "--random"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT)
    figures = list(map(json.loads, done.stdout.splitlines()))
    assert [line["gradient_checkpointing"] for line in figures] == [False, True]
    assert all(0.8 < line["ratio"] < 1.2 for line in figures), figures


def test_a_mac_is_told_that_it_trains_on_the_cpu(monkeypatch, capsys):
    for system, told in (("darwin", True), ("linux", False)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", system)
            patch.setattr("platform.machine", lambda: "arm64")
            assert has_apple_gpu() is told
        monkeypatch.setattr("nesso_tune.cli.check.has_apple_gpu", lambda told=told: told)
        code, out, _ = main_here(capsys, "check", "quickstart/sft")
        assert (code, NO_MPS in out) == (0, told)
        assert NO_MPS not in main_here(capsys, "check", "quickstart/sft", "--gpu", "h200")[1], "another machine"
