"""The processes and GPUs of a run, and whether the configuration of its launcher agrees with the recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from nesso_tune.distributed.process_group import world_size
from nesso_tune.errors import Problem, RecipeError
from nesso_tune.logs import logger
from nesso_tune.planning.hardware import gpu_of_device
from nesso_tune.planning.plan import Plan, World
from nesso_tune.recipes.schema import Recipe

WHERE = "accelerate's configuration"
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or pipeline parallelism",
}


def detect_world() -> World:
    """Number of processes, in all and on each node, and, if there is one, the GPU."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())
    if not torch.cuda.is_available():
        return World(world_size(), None, per_node)
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    gpu = gpu_of_device(torch.cuda.get_device_name(), memory, torch.cuda.is_bf16_supported())
    return World(world_size(), gpu, per_node)


def agreed_world() -> World:
    """`detect_world` with the smallest GPU of all ranks, so that they all make the same plan. Collective."""
    own = detect_world()
    if own.processes == 1:
        return own
    gpus = gather_object([own.gpu])
    present = [gpu for gpu in gpus if gpu is not None]
    smallest = min(present, key=lambda gpu: (gpu.memory, gpu.name)) if len(present) == len(gpus) else None
    if smallest is not None and len(names := {gpu.name for gpu in present}) > 1:
        logger.info(f"the GPUs differ ({', '.join(sorted(names))}): every process trains as the smallest can")
    return replace(own, gpu=smallest)


def idle_gpus() -> int:
    """Number of GPUs of this node that the run does not use."""
    return max(0, torch.cuda.device_count() - int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))


def check_launcher_config(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> None:
    """Compares the launcher's configuration with the recipe.

    Raises:
        RecipeError: with every setting that is not supported or contradicts the recipe.
    """
    problems = [
        Problem(WHERE, f"{name} is not supported", "remove it; sharding is set by `distributed` in the recipe")
        for variable, name in UNSUPPORTED.items()
        if _is_true(environment.get(variable))
    ]
    problems += [
        Problem(WHERE, f"sets {theirs}, the recipe {ours}", "make the two equal, or remove it from the configuration")
        for theirs, ours in _contradictions(recipe, plan, environment)
    ]
    if problems:
        raise RecipeError(problems)


def _contradictions(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of (launcher's setting, recipe's setting) that contradict each other."""
    found = []
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    allowed = ("no", "bf16") if recipe.model.dtype == "bfloat16" else ("no",)
    if precision not in allowed:
        found.append((f"mixed_precision: {precision}", f"model.dtype: {recipe.model.dtype}"))
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        found.append((f"dynamo_backend: {backend}", "compiles with train.torch_compile only"))
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(plan.accumulation)):
        found.append((f"gradient_accumulation_steps: {steps}", f"accumulation {plan.accumulation}"))
    if plan.processes > 1 and _is_true(environment.get("ACCELERATE_USE_FSDP")):
        found += _fsdp_contradictions(recipe, plan, environment)
    return found


def _fsdp_contradictions(recipe: Recipe, plan: Plan, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    setting = f"distributed.fsdp: {recipe.distributed.fsdp}"
    if not plan.sharded:
        setting += f", which does not shard here ({plan.sharding_reason})" if plan.sharding_reason else ""
        return [("distributed_type: FSDP", setting)]
    found = []
    version = environment.get("FSDP_VERSION", "2")
    if version != "2":
        found.append((f"fsdp_version: {version}", f"{setting}, which is FSDP version 2"))
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if version == "2" and reshard not in ("true", "full_shard"):
        found.append((f"fsdp_reshard_after_forward: {reshard}", f"{setting}, which reshards after forward"))
    if _is_true(environment.get("FSDP_OFFLOAD_PARAMS")):
        found.append(("fsdp_offload_params: true", "does not offload"))
    wrap = environment.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    if wrap != "TRANSFORMER_BASED_WRAP":
        found.append((f"fsdp_auto_wrap_policy: {wrap}", f"{setting}, which wraps each layer (TRANSFORMER_BASED_WRAP)"))
    if _is_true(environment.get("FSDP_ACTIVATION_CHECKPOINTING")) and not plan.gradient_checkpointing:
        found.append(("fsdp_activation_checkpointing: true", "train.gradient_checkpointing: false"))
    kind = environment.get("FSDP_STATE_DICT_TYPE")
    if kind not in (None, f"{recipe.distributed.state_dict.upper()}_STATE_DICT"):
        found.append((f"fsdp_state_dict_type: {kind}", f"distributed.state_dict: {recipe.distributed.state_dict}"))
    return found


def _is_true(value: str | None) -> bool:
    return (value or "").lower() in ("true", "1", "yes")
