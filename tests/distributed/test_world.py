"""The launcher's configuration is compared with the recipe."""

import pytest

from nesso_tune import RecipeError
from nesso_tune.distributed.world import check_launcher_config
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from tests.support.runs import recipe


def check(environment, processes=2, dtype="bfloat16", fsdp="full_shard", **train):
    some = recipe("sft", "run", ["x.jsonl"], model={"dtype": dtype}, distributed={"fsdp": fsdp}, train=train)
    check_launcher_config(some, make_plan(some, World(processes)), environment)


AGREE = [
    {}, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
    {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {"ACCELERATE_USE_FSDP": "false"},
]  # fmt: skip


@pytest.mark.parametrize("environment", AGREE)
def test_an_equal_or_empty_configuration_is_accepted(environment):
    check(environment)


FSDP = {"ACCELERATE_USE_FSDP": "true"}
AGAINST = {
    "precision": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "fp16, the recipe model.dtype: bfloat16"),
    "precision of float32": ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"dtype": "float32"}, "model.dtype: float32"),
    "compiler": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend: INDUCTOR"),
    "accumulation": ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, {"gradient_accumulation_steps": 4},
                     "gradient_accumulation_steps: 8, the recipe accumulation 4"),
    "no sharding": (FSDP, {"fsdp": "none"}, "distributed_type: FSDP, the recipe distributed.fsdp: none"),
    "no sharding by auto": (FSDP, {"fsdp": "auto"}, "distributed.fsdp: auto, which does not shard here (on CPUs"),
    "version 1": (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version: 1, the recipe distributed.fsdp: full_shard"),
    "no resharding": (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}, "fsdp_reshard_after_forward: false"),
    "offloading": (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true"),
    "wrapping": (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "fsdp_auto_wrap_policy: SIZE_BASED_WRAP"),
    "checkpointing": (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"gradient_checkpointing": False},
                      "fsdp_activation_checkpointing: true, the recipe train.gradient_checkpointing: false"),
    "sharded state": (FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "distributed.state_dict: full"),
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed is not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "keys", "says"), AGAINST.values(), ids=AGAINST)
def test_a_contradiction_names_both_values(environment, keys, says):
    with pytest.raises(RecipeError) as error:
        check(environment, **keys)
    assert says in str(error.value)


def test_all_contradictions_are_reported_together():
    with pytest.raises(RecipeError) as error:
        check({"ACCELERATE_MIXED_PRECISION": "fp16", **FSDP, "FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"})
    assert len(error.value.problems) == 3


def test_a_single_process_ignores_the_fsdp_configuration():
    check(FSDP | {"FSDP_VERSION": "1"}, processes=1)
