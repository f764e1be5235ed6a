"""The bound of a step: published runs, the FLOPs of the model, and what makes it longer."""

from dataclasses import replace

import pytest

from nesso_tune.planning.hardware import GIB, find_gpu, gpu_of_device
from nesso_tune.planning.plan import REALISTIC, DataVolume, World
from nesso_tune.planning.planner import make_plan
from nesso_tune.planning.roofline import Work, model_flops, step_bound
from nesso_tune.planning.shapes import ModelShape, known_config, shape_of
from tests.support.recipe_texts import DPO, SFT, read

ZAGREUS, EIGHT = (shape_of(known_config(base)) for base in ("mii-llm/zagreus-0.4B-ita", "meta-llama/Llama-3.1-8B"))
TYPICAL = REALISTIC**0.5  # in the middle of the range that a plan states


def mpt(hidden, heads):
    """MPT has an MLP of two matrices of four times the width: as many weights as three of 8/3."""
    return ModelShape(50368, hidden, hidden * 8 // 3, 24, heads, heads, hidden // heads, tied=True, context=2048)


def work(micro_batch, row, **changes):
    """A step on one process as others train: every token is supervised, and a row is one document."""
    tokens = micro_batch * row
    base = Work(tokens, tokens, row, row, 8, 8, sharded=True, checkpointing=False, compiled=True)
    return replace(base, **changes)


# Published: LLM Foundry's tables (scripts/train/benchmarking), nanochat, torchtitan. Not all state micro batch and row
# length, which are then usual ones.
PUBLISHED = {  # shape, GPU, work, MFU by the common count
    "LLM Foundry, 350M, A100": (mpt(1024, 16), "a100-80gb", work(8, 4096), 0.53),
    "LLM Foundry, 1B, A100": (mpt(2048, 16), "a100-80gb", work(8, 2048), 0.60),
    "LLM Foundry, 760M, H100": (mpt(1536, 12), "h100", work(8, 2048), 0.36),
    "LLM Foundry, 1B, H100": (mpt(2048, 16), "h100", work(8, 2048), 0.40),
    "nanochat d18, H100": (ModelShape(65536, 1152, 3072, 18, 9, 9, 128, False, 2048), "h100",
                           work(32, 2048, accumulation=1, sharded=False), 0.46),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "gpu", "step", "mfu"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_utilisation_is_within_25_percent(shape, gpu, step, mfu):
    bound = step_bound(read(SFT), shape, find_gpu(gpu), step)
    assert bound.mfu_common / TYPICAL == pytest.approx(mfu, rel=0.25)


@pytest.mark.parametrize(("compiled", "speed"), [(True, 6667), (False, 6667 / 1.16)])
def test_published_speed_of_an_8b_model_is_within_25_percent(compiled, speed):
    """torchtitan, Llama 3.1 8B, FSDP with selective recomputation, tokens per second and H100."""
    step = work(1, 8192, accumulation=1, checkpointing=True, compiled=compiled)
    assert 8192 / (TYPICAL * step_bound(read(SFT), EIGHT, find_gpu("h100"), step).seconds) == pytest.approx(
        speed, rel=0.25
    )


# Kernel by kernel on tensors without data: products, attention and all else in ms, for a micro batch of Zagreus's shape
COUNTED = {("h200", 1): (19.6, 2.4, 27.2), ("h200", 8): (134.9, 19.2, 179.4)}


@pytest.mark.parametrize(("gpu", "rows"), COUNTED)
def test_the_parts_are_those_of_counted_kernels(gpu, rows):
    step = Work(4096 * rows, 0.51 * 4096 * rows, 3.3e6 / 4096, 4096, 1, 1, False, False, compiled=False)
    bound = step_bound(read(SFT), ZAGREUS, find_gpu(gpu), step)
    parts = [1000 * part for part in (bound.products, bound.attention, bound.traffic)]
    assert parts == pytest.approx(COUNTED[gpu, rows], rel=0.1)


def test_the_flops_of_both_conventions():
    step = work(1, 1000, supervised=400, document=100, accumulation=1)
    layers = 32 * (960 * 64 * (2 * 15 + 2 * 5) + 3 * 960 * 2560)
    head, width = 128256 * 960, 12 * 32 * 960
    ours, common = model_flops(read(SFT), ZAGREUS, step)
    assert ours == pytest.approx(6 * layers * 1000 + 6 * head * 400 + width * 1000 * 100 / 2)
    assert common == pytest.approx((6 * layers + 6 * head + width * 1000) * 1000)
    lora = read(SFT.replace("base: b", "base: b, adapter: {type: lora}"))
    assert model_flops(lora, ZAGREUS, step)[0] < 0.75 * ours


def seconds(text=SFT, gpu="h200", shape=ZAGREUS, **changes):
    step = work(4, 4096, **{"processes": 1, "sharded": False, **changes})
    return step_bound(read(text), shape, find_gpu(gpu), step).seconds


def test_what_makes_a_step_longer():
    plain = seconds()
    assert seconds(compiled=False) > 1.3 * plain
    assert 1.15 * plain < seconds(checkpointing=True) < 1.5 * plain
    assert seconds(gpu="a100-80gb") > 2 * plain
    assert seconds(gpu="h100") > plain, "less bandwidth"
    shared = [work(1, 512, processes=n, sharded=True, accumulation=1) for n in (1, 8, 16)]
    alone, machine, network = (step_bound(read(SFT), ZAGREUS, find_gpu("h200"), step) for step in shared)
    assert alone.communication == 0 < machine.communication < network.communication / 5
    assert network.seconds > machine.seconds, "between machines the weights come later than the products"
    assert seconds(document=64) < plain
    assert seconds(supervised=4096) < plain
    lora, qlora = (SFT.replace("base: b", f"base: b, adapter: {{type: {kind}}}") for kind in ("lora", "qlora"))
    assert seconds(lora, shape=EIGHT) < seconds(shape=EIGHT)
    assert seconds(qlora, shape=EIGHT) > seconds(lora, shape=EIGHT)


def test_a_small_micro_batch_waits_for_the_host():
    step = Work(128, 128, 128, 128, 1, 1, False, False, compiled=False)
    bound = step_bound(read(SFT), ZAGREUS, find_gpu("h200"), step)
    assert bound.seconds == pytest.approx(bound.launches + bound.optimizer)


def test_without_known_speeds_nothing_is_said():
    for text, gpu in (
        (SFT, None),
        (SFT, find_gpu("v100-16gb")),
        (SFT.replace("base: b", "base: b, dtype: float32"), find_gpu("h200")),
    ):
        assert step_bound(read(text), ZAGREUS, gpu, work(1, 4096)) is None


def test_the_plan_states_the_range_and_both_conventions():
    volume = DataVolume(1000, 1000 * 4000, 1000 * 2000, document_length=800)
    made = make_plan(read(f"{SFT}train: {{max_steps: 90}}\n"), World(1, find_gpu("h200")), volume, ZAGREUS)
    low, high = made.step_seconds
    assert (low, high) == (made.bound.seconds, REALISTIC * made.bound.seconds)
    assert made.bound.mfu < made.bound.mfu_common
    two = make_plan(read(f"{SFT}train: {{max_steps: 90}}\n"), World(1), volume, ZAGREUS)
    assert (two.bound, two.step_seconds) == (None, None)
    pairs = make_plan(read(f"{DPO}train: {{max_steps: 90}}\n"), World(1, find_gpu("h200")), None, ZAGREUS)
    assert pairs.bound is not None


@pytest.mark.parametrize(
    ("name", "gib", "bandwidth", "link"),
    [("NVIDIA A100-SXM-64GB", 64, 1635e9, 300e9), ("NVIDIA A100-SXM4-40GB", 40, 1555e9, 300e9),
     ("NVIDIA A100-PCIE-40GB", 40, 1555e9, 32e9), ("NVIDIA H100 PCIe", 80, 2000e9, 64e9),
     ("NVIDIA L40S", 45, 864e9, 32e9), ("AMD Instinct MI250X", 64, 1638e9, 100e9),
     ("NVIDIA GH200 480GB", 96, None, None)],
)  # fmt: skip
def test_a_device_has_the_speeds_of_its_kind_and_its_own_memory(name, gib, bandwidth, link):
    gpu = gpu_of_device(name, gib * GIB - 1)
    assert (gpu.name, gpu.memory, gpu.bandwidth, gpu.link) == (name, gib * GIB - 1, bandwidth, link)
