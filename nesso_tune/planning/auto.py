"""What `auto` chooses by the plan's memory and the roofline: sharding, micro batch and gradient checkpointing.

This is the only place that decides whether the state of a run is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from nesso_tune.errors import RecipeError
from nesso_tune.planning.hardware import GIB
from nesso_tune.planning.memory import MEMORY_SAFE_SHARE, Memory, estimate_memory, trained_parameters
from nesso_tune.planning.plan import DataVolume, Plan, World
from nesso_tune.planning.roofline import StepBound, Work, step_bound
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import SFTData

MIN_SHARDING_GAIN = 0.1  # of a step's time, for which auto shards a state that fits whole
AUTO_TOKENS = 4096  # of a micro batch where no GPU memory decides: more is not faster on a CPU
SUPERVISED_SHARE = 0.5  # of the tokens, if the data is unknown


@dataclass(frozen=True)
class Recorded:
    """Earlier choices of `auto` that a run keeps; None to choose.

    Attributes:
        micro_batch: rows per process and forward pass.
        sharded: whether the state is sharded.
        reason: where they come from.
    """

    micro_batch: int | None = None
    sharded: bool | None = None
    reason: str = "kept from the start of the run"


@dataclass(frozen=True)
class Choices:
    """How a run is trained, as the recipe says or `auto` chose.

    Attributes:
        micro_batch: rows per process and forward pass.
        micro_batch_reason: why auto chose it; empty if the recipe sets it.
        sharded: whether the state is sharded over the processes.
        replicas: groups of processes that each hold the whole sharded state.
        sharding_reason: why auto shards or not, likewise.
        checkpointing: whether activations are recomputed; None if undecided, because the GPU is unknown.
    """

    micro_batch: int
    micro_batch_reason: str
    sharded: bool
    replicas: int
    sharding_reason: str
    checkpointing: bool | None


@dataclass(frozen=True)
class Setting:
    """What the choices depend on.

    Attributes:
        recipe, shape, world, volume: as of `make_plan`.
        rows: rows of a step on each process.
        compiled: whether layers are compiled.
    """

    recipe: Recipe
    shape: ModelShape | None
    world: World
    volume: DataVolume | None
    rows: int
    compiled: bool

    @classmethod
    def of(cls, recipe: Recipe, plan: Plan) -> Setting:
        """The setting of a plan."""
        world, rows = World(plan.processes, plan.gpu, plan.per_node), plan.micro_batch * plan.accumulation
        return cls(recipe, plan.shape, world, plan.volume, rows, plan.torch_compile)

    @property
    def replicas(self) -> int:
        """Groups of processes that each hold the whole state, if it is sharded: hybrid_shard has one on each node."""
        return replicas(self.world) if self.recipe.distributed.fsdp == "hybrid_shard" else 1

    def recomputations(self, sharded: bool) -> tuple[bool, ...]:
        """Whether activations may be recomputed, as the recipe says or for auto both; with it last.

        FSDP recomputes with other dropout masks, so a sharded adapter with dropout trains without.
        """
        wanted, adapter = self.recipe.train.gradient_checkpointing, self.recipe.model.adapter
        if wanted != "auto":
            return (wanted,)
        return (False,) if sharded and adapter is not None and adapter.dropout else (False, True)

    def memory(self, micro_batch: int, sharded: bool, checkpointing: bool) -> Memory | None:
        """Memory of a step; None if the shape of the model is unknown."""
        volume = self.volume
        if self.shape is None:
            return None
        shards = self.world.processes // self.replicas if sharded else 1
        memory = estimate_memory(
            self.recipe, self.shape, shards=shards, micro_batch=micro_batch,
            checkpointing=checkpointing, on_gpu=self.world.gpu is not None,
            supervised=volume.supervised_tokens / volume.tokens if volume and volume.tokens else 1.0,
        )  # fmt: skip
        if self.world.processes == 1 or sharded:
            return memory
        buckets = 4 * trained_parameters(self.recipe.model.adapter, self.shape)  # DDP reduces a copy of the gradients
        return replace(memory, working=memory.working + buckets)

    def fits(self, micro_batch: int, sharded: bool, checkpointing: bool) -> bool:
        """Whether a step takes at most the safe share of the memory of the GPU; False if it is unknown."""
        memory, gpu = self.memory(micro_batch, sharded, checkpointing), self.world.gpu
        return memory is not None and gpu is not None and memory.total <= MEMORY_SAFE_SHARE * gpu.memory

    def bound(self, micro_batch: int, sharded: bool, checkpointing: bool) -> StepBound | None:
        """Bound of a step by the roofline; None if the shape or the speed of the GPU is unknown."""
        if self.shape is None:
            return None
        volume, data = self.volume, self.recipe.data
        tokens = float(data.sequence_len * (1 if self.recipe.method == "sft" else 2))
        supervised, document = SUPERVISED_SHARE * tokens, None
        if volume and volume.rows and volume.tokens:
            tokens, supervised = volume.tokens / volume.rows, volume.supervised_tokens / volume.rows
            document = volume.document_length
        packed = isinstance(data, SFTData) and data.packing
        if self.compiled and packed:
            tokens = float(data.sequence_len)  # padded to one length
        row = data.sequence_len if packed else min(tokens, data.sequence_len)
        work = Work(
            tokens=micro_batch * tokens, supervised=micro_batch * supervised,
            document=document or min(tokens, data.sequence_len), row=round(row),
            accumulation=self.rows // micro_batch, processes=self.world.processes, sharded=sharded,
            checkpointing=checkpointing, compiled=self.compiled, replicas=self.replicas if sharded else 1,
            per_node=self.world.per_node,
        )  # fmt: skip
        return step_bound(self.recipe, self.shape, self.world.gpu, work)


def choose(setting: Setting, recorded: Recorded) -> Choices:
    """Decides how a run is trained.

    Args:
        setting: recipe, devices and data.
        recorded: the choices of the run that resumes.

    Raises:
        RecipeError: if the processes are not spread over nodes as the recipe's sharding needs.
    """
    _check_nodes(setting)
    sharded, sharding_reason = _sharding(setting, recorded)
    sharing = sharded, setting.replicas if sharded else 1, sharding_reason
    size = setting.recipe.train.micro_batch_size
    if size != "auto":
        return Choices(size, "", *sharing, _checkpointing(setting, size, sharded))
    micro, checkpointing, reason = _micro_batch(setting, sharded, recorded)
    return Choices(micro, reason, *sharing, checkpointing)


def replicas(world: World) -> int:
    """Number of nodes."""
    return max(1, world.processes // (world.per_node or world.processes))


def _check_nodes(setting: Setting) -> None:
    world, per_node = setting.world, setting.world.per_node
    if setting.recipe.distributed.fsdp != "hybrid_shard" or world.processes == 1 or per_node is None:
        return
    if per_node == 1 or world.processes % per_node:
        spread = "one process" if per_node == 1 else f"{per_node} of {world.processes} processes"
        raise RecipeError(
            "distributed.fsdp", f"hybrid_shard shards over the processes of a node, and a node has {spread}",
            "start the same number of processes, at least two, on each node, or set full_shard",
        )  # fmt: skip


def _sharding(setting: Setting, recorded: Recorded) -> tuple[bool, str]:
    """Whether to shard, and why if the recipe leaves it open."""
    recipe, world = setting.recipe, setting.world
    if world.processes == 1:
        return False, ""
    if recipe.needs_bitsandbytes:
        weights = recipe.model.adapter is not None and recipe.model.adapter.type == "qlora"
        return False, f"{'4-bit weights' if weights else '8-bit moments'} cannot be sharded"
    if recipe.distributed.fsdp != "auto":
        return recipe.distributed.fsdp != "none", ""
    if recorded.sharded is not None:
        return recorded.sharded, recorded.reason
    if recipe.distributed.state_dict == "sharded":
        return True, "distributed.state_dict is sharded"
    if world.gpu is None:
        return False, "on CPUs; on GPUs their memory decides"
    if setting.shape is None:
        return True, "the size of the base model is unknown"
    size = recipe.train.micro_batch_size
    whole, shared = (_fitting(setting, sharded, size) for sharded in (False, True))
    if not whole:
        least = _share(setting, 1 if size == "auto" else size, setting.recomputations(False)[-1])
        return True, f"a step would take about {least} with the whole state"
    seconds, recompute = _fastest(setting, False, whole)
    is_known = setting.bound(whole[recompute], False, recompute) is not None
    gain = 1 - _fastest(setting, True, shared)[0] / seconds if is_known and shared else 0.0
    if gain >= MIN_SHARDING_GAIN:
        return True, f"the whole state fits, but a step is about {gain:.0%} faster with the memory that sharding frees"
    return False, f"a step takes about {_share(setting, whole[recompute], recompute)} with the whole state"


def _share(setting: Setting, micro_batch: int, recompute: bool) -> str:
    """Memory of a step with the whole state on each GPU, and that of the GPU."""
    memory, gpu = setting.memory(micro_batch, False, recompute), setting.world.gpu
    assert memory is not None
    assert gpu is not None
    return f"{memory.total / GIB:.0f} of {gpu.memory / GIB:.0f} GiB"


def _fastest(setting: Setting, sharded: bool, fitting: Mapping[bool, int]) -> tuple[float, bool]:
    """Seconds of the fastest step of `_fitting`, and whether it recomputes."""
    return min((_seconds(setting, n, sharded, recompute), recompute) for recompute, n in fitting.items())


def _micro_batch(setting: Setting, sharded: bool, recorded: Recorded) -> tuple[int, bool | None, str]:
    """Micro batch, gradient checkpointing, and why."""
    sizes = divisors(setting.rows)
    if recorded.micro_batch is not None:
        kept, reason = max(n for n in sizes if n <= recorded.micro_batch), recorded.reason
        if kept != recorded.micro_batch:
            reason += f", where it was {recorded.micro_batch}, which does not divide {setting.rows} rows per process"
        return kept, _checkpointing(setting, kept, sharded), reason
    gpu = setting.world.gpu
    if gpu is None or setting.shape is None:
        row = setting.recipe.data.sequence_len * (1 if setting.recipe.method == "sft" else 2)
        chosen = max(n for n in sizes if n == 1 or n * row <= AUTO_TOKENS)
        why = "without a GPU" if gpu is None else "the size of the base model is unknown"
        return chosen, _checkpointing(setting, chosen, sharded), f"{why}: rows of at most {AUTO_TOKENS:,} tokens"
    fitting = _fitting(setting, sharded, "auto")
    share = f"{MEMORY_SAFE_SHARE:.0%} of {gpu.memory / GIB:.0f} GiB"
    if not fitting:
        return 1, setting.recomputations(sharded)[-1], f"one row already takes more than {share}"
    _, best = _fastest(setting, sharded, fitting)
    reason = f"the largest divisor of {setting.rows} rows that takes at most {share}"
    other = fitting.get(not best)
    if other is not None and other != fitting[best]:
        how = "with" if not best else "without"
        reason += f"; {other} fit {how} gradient checkpointing, but a step would take longer"
    return fitting[best], best, reason


def _fitting(setting: Setting, sharded: bool, size: int | Literal["auto"]) -> dict[bool, int]:
    """The largest micro batch that fits, or the given one if it does, by whether activations are recomputed."""
    sizes = divisors(setting.rows) if size == "auto" else [size]
    fitting = {
        again: [n for n in sizes if setting.fits(n, sharded, again)] for again in setting.recomputations(sharded)
    }
    return {again: max(found) for again, found in fitting.items() if found}


def with_micro_batch(recipe: Recipe, plan: Plan, micro_batch: int, reason: str) -> Plan:
    """The plan of the same steps with another micro batch, which divides the rows of a step on each process."""
    setting = Setting.of(recipe, plan)
    how = micro_batch, plan.sharded, bool(plan.gradient_checkpointing)
    return replace(
        plan, micro_batch=micro_batch, accumulation=setting.rows // micro_batch, micro_batch_reason=reason,
        memory=setting.memory(*how), bound=setting.bound(*how),
    )  # fmt: skip


def divisors(number: int) -> list[int]:
    """The divisors of a number in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _seconds(setting: Setting, micro_batch: int, sharded: bool, checkpointing: bool) -> float:
    """Bound of a step; without one, no checkpointing is taken for faster."""
    bound = setting.bound(micro_batch, sharded, checkpointing)
    return float(checkpointing) if bound is None else bound.seconds


def _checkpointing(setting: Setting, micro_batch: int, sharded: bool) -> bool | None:
    """Whether to recompute activations: as in the recipe, or for auto, if a step would not fit into GPU memory."""
    wanted = setting.recipe.train.gradient_checkpointing
    if wanted != "auto" or setting.world.gpu is None:
        return None if wanted == "auto" else wanted
    return not setting.fits(micro_batch, sharded, False) and setting.recomputations(sharded)[-1]
