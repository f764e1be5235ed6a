"""What `auto` chooses: whether to shard, the micro batch and gradient checkpointing."""

import re

import pytest

from nesso_tune.errors import RecipeError
from nesso_tune.planning.auto import Recorded, divisors, with_micro_batch
from nesso_tune.planning.hardware import GIB, Gpu, find_gpu
from nesso_tune.planning.memory import MEMORY_SAFE_SHARE
from nesso_tune.planning.plan import DataVolume, World, describe
from nesso_tune.planning.planner import make_plan
from nesso_tune.planning.shapes import known_config, shape_of
from tests.support.recipe_texts import DPO, SFT, problem, read

ZAGREUS, EIGHT = (shape_of(known_config(base)) for base in ("mii-llm/zagreus-0.4B-ita", "meta-llama/Llama-3.1-8B"))
AUTO = "max_steps: 90, micro_batch_size: auto, global_batch_size: 256"
QLORA = SFT.replace("base: b", "base: b, adapter: {type: qlora}")


def plan(keys=AUTO, gpu="h200", shape=ZAGREUS, processes=1, text=SFT, fsdp="auto", recorded=None, per_node=None):
    """The plan on a GPU of the table, of a number of GiB, or on a CPU (None)."""
    device = gpu if gpu is None else Gpu("small", gpu * GIB) if isinstance(gpu, int) else find_gpu(gpu)
    recipe = read(f"{text}train: {{{keys}}}\ndistributed: {{fsdp: {fsdp}}}\n")
    return make_plan(recipe, World(processes, device, per_node), None, shape, recorded)


@pytest.mark.parametrize(
    ("shape", "gpu", "processes", "sharded", "reason"),
    [(ZAGREUS, "a100-80gb", 8, False, "a step takes about 18 of 80 GiB with the whole state"),
     (EIGHT, "a100-80gb", 8, True, "a step would take about "),
     (ZAGREUS, None, 8, False, "on CPUs"), (ZAGREUS, "a100-80gb", 1, False, ""),
     (None, "a100-80gb", 2, True, "the size of the base model is unknown")],
)  # fmt: skip
def test_auto_shards_what_does_not_fit(shape, gpu, processes, sharded, reason):
    made = plan("max_steps: 90", gpu, shape, processes)
    assert made.sharded is sharded
    assert made.sharding_reason.startswith(reason)
    assert bool(made.sharding_reason) is bool(reason)
    if reason:
        recipe = read(f"{SFT}train: {{max_steps: 90}}\n")
        assert f"fsdp auto: {made.sharding_reason}" in "\n".join(describe(made, recipe))


def test_a_state_that_fits_with_recomputation_is_not_sharded():
    made = plan("max_steps: 9, micro_batch_size: 16, gradient_accumulation_steps: 1", "a100-40gb", processes=8)
    assert (made.sharded, made.gradient_checkpointing) == (False, True)
    assert made.memory.total < 0.7 * 40 * GIB
    assert f"takes about {made.memory.total / GIB:.0f} of 40 GiB" in made.sharding_reason


def test_on_a_gpu_of_unknown_speed_a_state_that_fits_is_not_sharded():
    made = plan("max_steps: 9, micro_batch_size: 16, gradient_accumulation_steps: 1", 40, processes=8)
    assert (made.sharded, made.gradient_checkpointing, made.bound) == (False, True, None)


def test_a_state_that_fits_is_sharded_where_that_is_clearly_faster():
    keys, short = (
        "max_steps: 9, micro_batch_size: auto, global_batch_size: 512",
        SFT.replace("data:\n", "data:\n  sequence_len: 512\n"),
    )
    auto, whole, shared = (plan(keys, "mi325x", EIGHT, 8, short, fsdp) for fsdp in ("auto", "none", "full_shard"))
    assert whole.memory.total < 0.7 * 256 * GIB
    assert shared.bound.seconds < 0.9 * whole.bound.seconds
    assert auto.bound == shared.bound
    assert "a step is about " in auto.sharding_reason


def test_a_sharded_adapter_with_dropout_is_not_recomputed():
    """FSDP would recompute with other dropout masks, which the run refuses."""
    for dropout, recomputes in ((0.05, False), (0.0, True)):
        text = SFT.replace("base: b", f"base: b, adapter: {{type: lora, dropout: {dropout}}}")
        made = plan("max_steps: 9, micro_batch_size: auto, global_batch_size: 64", 18, EIGHT, 4, text)
        assert (made.sharded, made.gradient_checkpointing) == (True, recomputes), dropout


def test_the_recipe_decides_before_auto_and_what_cannot_be_sharded_before_both():
    assert plan("max_steps: 9", processes=2, fsdp="full_shard").sharded
    assert not plan("max_steps: 9", shape=EIGHT, gpu=24, processes=2, fsdp="none").sharded
    for keys, text in (("max_steps: 9", QLORA), ("max_steps: 9, optimizer: adamw_8bit", SFT)):
        for recorded in (None, Recorded(sharded=True)):
            made = plan(keys, gpu=24, shape=EIGHT, text=text, processes=2, recorded=recorded)
            assert not made.sharded
            assert "cannot be sharded" in made.sharding_reason
    shards = read(f"{SFT}distributed: {{state_dict: sharded}}\n")
    made = make_plan(shards, World(2, find_gpu("h200")), None, ZAGREUS)
    assert made.sharded
    assert made.sharded_checkpoints, "who asks for shards gets them"


@pytest.mark.parametrize(("gpu", "expected"), [("h200", 8), ("a100-80gb", 4), ("a100-64gb", 4), (24, 1)])
def test_the_micro_batch_is_the_largest_that_fits(gpu, expected):
    made, text = plan(gpu=gpu), f"train: {{{AUTO}}}"
    assert (made.micro_batch, made.accumulation, made.global_batch) == (expected, 256 // expected, 256)
    assert made.memory.total <= MEMORY_SAFE_SHARE * made.gpu.memory
    recipe = read(f"{SFT}{text}\n")
    if made.gradient_checkpointing is False:
        assert with_micro_batch(recipe, made, 2 * expected, "").memory.total > MEMORY_SAFE_SHARE * made.gpu.memory
    said = "\n".join(describe(made, recipe))
    assert f"(micro batch auto: {made.micro_batch_reason})" in said
    assert "same batch in fewer" not in said, "nothing to advise"


def test_it_divides_the_rows_of_each_process():
    for processes, micro in ((1, 10), (3, 10), (6, 5), (30, 1)):
        made = plan(AUTO.replace("256", "30"), processes=processes)
        assert made.micro_batch == micro
        assert made.micro_batch * made.accumulation * processes == 30
    with pytest.raises(
        RecipeError, match=r"global_batch_size: 256 is not a multiple of 3 process\(es\); set it to 255"
    ):
        plan(processes=3)
    assert divisors(360)[-3:] == [120, 180, 360]
    assert len(divisors(10**9)) == 100


def test_checkpointing_is_chosen_where_it_makes_steps_faster():
    """More rows with recomputation are slower than enough rows without; but if none fit without, it is the way."""
    free = plan(gpu="h200")
    assert free.gradient_checkpointing is False
    assert "fit with gradient checkpointing, but a step would take longer" in free.micro_batch_reason
    tight = plan(shape=EIGHT, gpu="a100-80gb", processes=8)
    assert tight.sharded
    assert tight.gradient_checkpointing is True
    assert tight.micro_batch > 1
    forced = plan(f"{AUTO}, gradient_checkpointing: true")
    assert forced.micro_batch > free.micro_batch
    assert forced.gradient_checkpointing is True
    off = plan(f"{AUTO}, gradient_checkpointing: false", shape=EIGHT, gpu=24)
    assert (off.micro_batch, off.gradient_checkpointing) == (1, False)
    assert off.micro_batch_reason.startswith("one row already takes more than 70% of 24 GiB")


def test_without_a_gpu_rows_of_4096_tokens():
    for length, micro in ((4096, 1), (1024, 4), (256, 16), (8192, 1)):
        text = SFT.replace("data:", f"data:\n  sequence_len: {length}")
        assert plan(gpu=None, text=text).micro_batch == micro
    assert plan(gpu=None, text=DPO).micro_batch == 2, "two answers of 1024 tokens"
    assert plan(shape=None, text=DPO).micro_batch == 2, "a base of unknown size"


def test_a_resumed_run_keeps_its_choices():
    kept = plan(gpu=24, recorded=Recorded(16, None))
    assert (kept.micro_batch, kept.accumulation) == (16, 16)
    assert kept.memory.total > MEMORY_SAFE_SHARE * kept.gpu.memory, "also on a smaller GPU"
    assert kept.micro_batch_reason == "kept from the start of the run"
    other = plan(processes=32, recorded=Recorded(16, True))
    assert (other.micro_batch, other.sharded) == (8, True)
    assert "where it was 16, which does not divide 8 rows per process" in other.micro_batch_reason
    said = plan("max_steps: 9, micro_batch_size: 2", recorded=Recorded(16, True), processes=2, fsdp="none")
    assert (said.micro_batch, said.sharded) == (2, False), "the recipe says otherwise"


def test_auto_needs_the_batch_of_a_step():
    for keys in ("micro_batch_size: auto", "micro_batch_size: auto, gradient_accumulation_steps: 8"):
        assert "`train.micro_batch_size` auto needs the number of rows of a step" in problem(
            f"{SFT}train: {{{keys}}}\n"
        )
    sorted_loss = f"{DPO}train: {{micro_batch_size: auto, global_batch_size: 8}}\ndpo: {{loss: {{aot: 1.0}}}}\n"
    assert "which micro_batch_size: auto may split" in problem(sorted_loss)


def test_processes_of_several_nodes_share_the_network():
    keys = "max_steps: 9, gradient_accumulation_steps: 1"
    one, two, hybrid = (plan(keys, "a100-64gb", EIGHT, 8, fsdp=fsdp, per_node=per_node)
                        for fsdp, per_node in (("full_shard", 8), ("full_shard", 4), ("hybrid_shard", 4)))  # fmt: skip
    assert two.bound.communication > 5 * one.bound.communication
    assert hybrid.bound.communication < two.bound.communication / 2
    assert (
        plan(keys, "h200", EIGHT, 16, fsdp="full_shard", per_node=16).bound.communication < 2 * one.bound.communication
    )


def test_the_common_mfu_of_rows_that_are_not_packed_is_of_their_length():
    """As `metrics.jsonl` counts it: full attention over a row, not over `sequence_len`."""
    recipe = read(SFT.replace("data:\n", "data:\n  sequence_len: 32768\n  packing: false\n"))
    volume = DataVolume(1000, 400_000, 200_000)
    made = make_plan(recipe, World(1, find_gpu("h200")), volume, ZAGREUS)
    assert made.bound.mfu < made.bound.mfu_common < 2 * made.bound.mfu


def test_the_time_of_a_step_is_known_without_the_number_of_steps():
    recipe = read(SFT)
    made = make_plan(recipe, World(8, find_gpu("h100")), None, EIGHT)
    assert made.total_steps is None
    (said,) = [line for line in describe(made, recipe) if line.startswith("time")]
    assert re.search(r"the number of steps is unknown, [\d.]+ to [\d.]+ s per step", said), said


def test_sharding_for_nothing_is_said():
    said = " / ".join(plan("max_steps: 90, gradient_accumulation_steps: 8", processes=32, fsdp="full_shard").advice)
    assert "full_shard gathers 12 GB of weights per step on each GPU, and the whole state fits (about 18 of" in said
    assert "full_shard gathers" not in " / ".join(plan("max_steps: 9", "a100-80gb", EIGHT, 8, fsdp="full_shard").advice)


def test_hybrid_sharding_holds_a_shard_of_the_node_and_keeps_weights_off_the_network():
    full, hybrid = (
        plan("max_steps: 90", "h200", EIGHT, 32, fsdp=fsdp, per_node=8) for fsdp in ("full_shard", "hybrid_shard")
    )
    assert [(made.shards, made.replicas) for made in (full, hybrid)] == [(32, 1), (8, 4)]
    one_node = plan("max_steps: 90", "h200", EIGHT, 8, fsdp="full_shard", per_node=8)
    assert hybrid.memory == one_node.memory, "as on a node alone"
    assert one_node.bound.communication < hybrid.bound.communication < full.bound.communication / 4
    assert hybrid.bound.optimizer == one_node.bound.optimizer
    recipe = read(f"{SFT}train: {{max_steps: 90}}\n")
    said = "over the 8 processes of each node, replicated on 4 nodes (FSDP2 HYBRID_SHARD), full checkpoints"
    assert said in "\n".join(describe(hybrid, recipe))
    alone = plan("max_steps: 90", "h200", EIGHT, 8, fsdp="hybrid_shard", per_node=8)
    assert (alone.shards, alone.replicas, alone.memory) == (8, 1, one_node.memory), "one node: full_shard"
    assert not plan("max_steps: 90", fsdp="hybrid_shard").sharded, "one process"


@pytest.mark.parametrize(("processes", "per_node", "spread"), [(4, 1, "one process"), (9, 2, "2 of 9 processes")])
def test_hybrid_sharding_needs_several_processes_on_each_node(processes, per_node, spread):
    with pytest.raises(RecipeError, match=f"over the processes of a node, and a node has {spread}; start the same"):
        plan("max_steps: 9", processes=processes, fsdp="hybrid_shard", per_node=per_node)


def test_full_sharding_is_advised_where_hybrid_sharding_does_not_fit():
    tight = plan("max_steps: 9", "a100-64gb", EIGHT, 8, fsdp="hybrid_shard", per_node=2)
    assert "shard over more GPUs (distributed.fsdp: full_shard)" in " / ".join(tight.advice)


def test_hybrid_sharding_is_advised_where_it_fits_and_is_faster():
    def advised(gpu, shape, **options):
        return [text for text in plan("max_steps: 90", gpu, shape, 32, **options).advice if "hybrid_shard" in text]

    for gpu in ("a100-64gb", "a100-80gb", "h200"):
        for fsdp in ("auto", "full_shard"):
            (text,) = advised(gpu, EIGHT, fsdp=fsdp, per_node=8)
            assert "hybrid_shard shards over the 8 GPUs of each node and is " in text
    assert not advised("h200", EIGHT, per_node=8, fsdp="hybrid_shard")
    assert not advised("h200", EIGHT), "one node"
    assert not advised("h200", EIGHT, per_node=1)
    assert not advised(24, EIGHT, per_node=8, fsdp="full_shard"), "no room for it, and no speeds"
    assert not advised("a100-80gb", ZAGREUS, per_node=8, fsdp="full_shard"), "not sharding is better"
