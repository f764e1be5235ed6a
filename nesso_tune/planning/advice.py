"""Advice on a planned run (`advise`), and default learning rates from tuned runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from nesso_tune.files import format_bytes
from nesso_tune.planning.auto import Recorded, Setting, choose
from nesso_tune.planning.hardware import GIB
from nesso_tune.planning.memory import MEMORY_SAFE_SHARE
from nesso_tune.planning.plan import Plan
from nesso_tune.planning.roofline import gathered_bytes
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.schema import DEFAULT_EPOCHS, Recipe, SFTRecipe
from nesso_tune.recipes.sections import SFTData

MIN_VALIDATION_ROWS = 20  # with fewer rows, the loss is noise
MAX_VALIDATION_ROWS = 20_000  # with more rows, evaluation is slow
MIN_STEPS = 30  # optimizer steps
EPOCHS_TOLERANCE = 0.1  # relative increase of epochs by rounding that is not reported
MAX_EPOCHS_RATIO = 4  # relative to the default epochs; few epochs are not reported
MAX_DROPPED_SHARE = 0.2  # share of rows dropped as too long
SMALL_DATASET_ROWS = 200  # with fewer rows, no validation share is large enough
SHORT_RUN_STEPS = 1000  # tuned learning rates do not apply to shorter runs
MAX_RATE_WITHOUT_WARMUP = 1e-4  # peak learning rate
MIN_HYBRID_GAIN = 0.05  # share of the step
MIN_GAIN = 0.01  # likewise, of other settings


@dataclass(frozen=True)
class TunedRun:
    """A run with a tuned learning rate.

    Attributes:
        parameters: number of parameters of the model.
        learning_rate: peak learning rate.
        batch: tokens (SFT) or pairs (DPO) per optimizer step.
        source: model or paper.
    """

    parameters: float
    learning_rate: float
    batch: int
    source: str


# Ordered by size. Learning rates between two sizes are interpolated in log-log space.
TUNED: dict[str, tuple[TunedRun, ...]] = {
    "sft": (
        TunedRun(1e6, 1e-3, 512, "nesso-tune quickstart"),
        TunedRun(4.38e8, 1e-3, 256 * 4096, "Nesso-0.4B-instruct"),
        TunedRun(8e9, 1e-5, 128 * 4096, "the usual rate for 8B models"),
    ),
    "dpo": (
        TunedRun(1e6, 3e-4, 8, "nesso-tune quickstart"),
        TunedRun(4.38e8, 1e-6, 128, "SmolLM2-360M-Instruct (arXiv:2502.02737)"),
        TunedRun(8e9, 5e-7, 128, "Llama-3.1-8B, Tulu 3 (arXiv:2411.15124)"),
    ),
}
DEFAULT_LEARNING_RATE = {"sft": 2e-5, "dpo": 1e-6}  # if the model size is unknown
ADAPTER_LEARNING_RATE = {
    "sft": 2e-4,
    "dpo": 5e-6,
}  # usual rates of LoRA; higher than for full fine-tuning


def advise(recipe: Recipe, plan: Plan) -> list[str]:
    """All advice, most urgent first."""
    return [text for rule in RULES for text in rule(recipe, plan)]


def auto_learning_rate(method: str, shape: ModelShape | None, adapter: bool = False) -> float:
    """Learning rate for a model of this size, interpolated between tuned runs and rounded to two digits."""
    if adapter:
        return ADAPTER_LEARNING_RATE[method]
    if shape is None:
        return DEFAULT_LEARNING_RATE[method]
    runs = TUNED[method]
    size = min(max(float(shape.parameters), runs[0].parameters), runs[-1].parameters)
    for small, large in pairwise(runs):
        if size <= large.parameters:
            fraction = math.log(size / small.parameters) / math.log(large.parameters / small.parameters)
            rate = small.learning_rate * (large.learning_rate / small.learning_rate) ** fraction
            return float(f"{rate:.1e}")
    return runs[-1].learning_rate


def nearest_tuned_run(method: str, shape: ModelShape) -> TunedRun:
    """The tuned run with the closest model size."""
    return min(TUNED[method], key=lambda run: abs(math.log(run.parameters / shape.parameters)))


@dataclass(frozen=True)
class BatchMismatch:
    """A tuned run with a different batch size, and its learning rate rescaled to the batch of this run."""

    run: TunedRun
    rate: float


def find_batch_mismatch(
    method: str, shape: ModelShape, learning_rate: float, rows: int, per_row: int
) -> BatchMismatch | None:
    """The nearest tuned run if it has a similar learning rate and a batch at least 4x larger or smaller; else None.

    The suggested rate scales with the square root of the batch size (Malladi et al., 2022, arXiv:2205.10287).

    Args:
        method: `sft` or `dpo`.
        shape: shape of the model.
        learning_rate: peak learning rate.
        rows: packed rows (SFT) or pairs (DPO) per step.
        per_row: tokens per row (SFT); 1 for pairs.
    """
    run = nearest_tuned_run(method, shape)
    ratio = rows * per_row / run.batch
    if 1 / 4 < ratio < 4 or not 1 / 2 <= learning_rate / run.learning_rate <= 2:
        return None
    return BatchMismatch(run, learning_rate * math.sqrt(ratio))


def _end_token(recipe: Recipe, plan: Plan) -> Iterator[str]:
    data = recipe.data
    if not isinstance(data, SFTData):
        return
    if data.train_on_eos == "none":
        yield "data.train_on_eos: none never teaches the model to stop; use turn"
    elif data.train_on_eos != "all" and "assistant" not in data.roles_to_train:
        yield "the end token of assistant turns is not supervised (data.roles_to_train): the model will not stop"


def _memory(recipe: Recipe, plan: Plan) -> Iterator[str]:
    gpu, memory = plan.gpu, plan.memory
    if gpu is None:
        return
    if not gpu.bfloat16 and recipe.model.dtype == "bfloat16":
        yield f"{gpu.name} has no bfloat16: set model.dtype: float32"
    if memory is None or memory.total <= gpu.memory:
        return
    fixed = memory.state + memory.working > gpu.memory  # independent of the batch
    ways = [] if fixed or plan.micro_batch == 1 else ["lower train.micro_batch_size"]
    ways += [] if fixed or plan.gradient_checkpointing else ["set train.gradient_checkpointing: true"]
    ways += ["lower data.sequence_len"] if not fixed and plan.micro_batch == 1 else []
    whole = not plan.sharded or plan.replicas > 1
    if recipe.model.adapter is None:
        more = " with train.optimizer: adamw_torch_fused" if recipe.train.optimizer == "adamw_8bit" else ""
        ways += [f"shard over more GPUs (distributed.fsdp: full_shard{more})"] if whole else ["use more GPUs"]
        ways += [] if recipe.model.random_init else ["train an adapter (model.adapter: {type: lora})"]
    elif recipe.model.adapter.type != "qlora" and plan.processes == 1 and fixed:
        ways += ["quantize the base to 4 bits (model.adapter.type: qlora)"]
    ways = ways or ["use a GPU with more memory, or a smaller base"]
    needed, there = (f"{count / GIB:.1f}" for count in (memory.total, gpu.memory))
    yield f"a step needs about {needed} GiB, {gpu.name} has {there}: {', or '.join(ways)}"


def _learning_rate(recipe: Recipe, plan: Plan) -> Iterator[str]:
    short = plan.total_steps is not None and plan.total_steps < SHORT_RUN_STEPS
    if short or plan.shape is None or recipe.model.adapter is not None:
        return
    per_row = recipe.data.sequence_len if isinstance(recipe, SFTRecipe) else 1
    if isinstance(recipe, SFTRecipe) and plan.volume and plan.volume.rows:
        per_row = max(1, round(plan.volume.tokens / plan.volume.rows))
    batch = find_batch_mismatch(recipe.method, plan.shape, plan.learning_rate, plan.global_batch, per_row)
    if batch is None:
        return
    unit = "tokens" if recipe.method == "sft" else "pairs"
    rows = f"{plan.global_batch:,} rows, " if recipe.method == "sft" else ""
    wanted = 2 ** max(0, round(math.log2(batch.run.batch / per_row)))
    fits = wanted % (plan.micro_batch * plan.processes) == 0 and (plan.volume is None or wanted < plan.volume.rows)
    yield (
        f"learning rate {plan.learning_rate:g} was tuned for {batch.run.batch:,} {unit} per step ({batch.run.source}); "
        f"this run has {rows}{plan.global_batch * per_row:,} {unit}: consider {batch.rate:.1e}"
        + (f", or {_batch_setting(recipe, plan, wanted)}" if fits else "")
    )


def _batch_setting(recipe: Recipe, plan: Plan, rows: int) -> str:
    """The recipe setting for a global batch of `rows`."""
    if recipe.train.gradient_accumulation_steps is None:
        return f"train.global_batch_size: {rows}"
    return f"train.gradient_accumulation_steps: {rows // (plan.micro_batch * plan.processes)} (global batch {rows})"


def _smaller_batch(recipe: Recipe) -> str | None:
    """The setting that reduces the global batch of this recipe; None if it is minimal."""
    train = recipe.train
    if train.global_batch_size is not None:
        return "lower train.global_batch_size" if train.global_batch_size > 1 else None
    if (train.gradient_accumulation_steps or 1) > 1:
        return "lower train.gradient_accumulation_steps"
    return "lower train.micro_batch_size" if train.micro_batch_size not in ("auto", 1) else None


def _warm_up(recipe: Recipe, plan: Plan) -> Iterator[str]:
    schedule = recipe.train.schedule
    cold = schedule.warmup_steps == 0 or schedule.warmup_ratio == 0
    run = None if plan.shape is None else nearest_tuned_run(recipe.method, plan.shape)
    high = MAX_RATE_WITHOUT_WARMUP if run is None else min(MAX_RATE_WITHOUT_WARMUP, run.learning_rate / 2)
    if cold and plan.learning_rate >= high:
        instead = " instead of warmup_steps" if schedule.warmup_steps == 0 else ""
        yield f"no warm-up at a learning rate of {plan.learning_rate:g}: set train.schedule.warmup_ratio: 0.03{instead}"


def _zero_rate_tail(recipe: Recipe, plan: Plan) -> Iterator[str]:
    schedule = recipe.train.schedule
    end = 1.0 if schedule.constant_ratio is None else schedule.constant_ratio
    if schedule.type != "constant" and end < 1 and not schedule.min_ratio:
        yield (
            f"the last {1 - end:.0%} of the run has a learning rate of 0 and does not change the model: set "
            "train.schedule.min_ratio: 0.1, or constant_ratio: 1.0"
        )


def _throughput(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Faster settings with equal results that fit into GPU memory."""
    gpu, memory, train = plan.gpu, plan.memory, recipe.train
    if gpu is None or memory is None or memory.total > gpu.memory:
        return
    setting, checkpointing = Setting.of(recipe, plan), bool(plan.gradient_checkpointing)

    def total(micro_batch: int, checkpointing: bool) -> int:
        estimated = setting.memory(micro_batch, plan.sharded, checkpointing)
        return estimated.total if estimated else 0

    without = total(plan.micro_batch, False)
    if train.gradient_checkpointing is True and without <= MEMORY_SAFE_SHARE * gpu.memory:
        checkpointing = False
        yield (
            f"gradient checkpointing is not needed: about {without / GIB:.0f} of {gpu.memory / GIB:.0f} GiB without; "
            "set train.gradient_checkpointing: auto or false to avoid recomputation"
        )
    splits = [n for n in range(2, plan.accumulation + 1) if plan.accumulation % n == 0]
    room = [n for n in splits if setting.fits(n * plan.micro_batch, plan.sharded, checkpointing)]
    bound = setting.bound(max(room) * plan.micro_batch, plan.sharded, checkpointing) if room else None
    gain = 1.0 if bound is None or plan.bound is None else 1 - bound.seconds / plan.bound.seconds
    if room and gain >= MIN_GAIN and train.micro_batch_size != "auto":
        micro, rest = max(room) * plan.micro_batch, plan.accumulation // max(room)
        follows = train.global_batch_size is not None
        with_rest = f", accumulation becomes {rest}" if follows else f" with gradient_accumulation_steps: {rest}"
        faster = "" if bound is None or plan.bound is None else f"{gain:.0%} faster, "
        yield (
            f"the same batch in fewer, larger steps: train.micro_batch_size: {micro}{with_rest} ({faster}about "
            f"{total(micro, checkpointing) / GIB:.0f} of {gpu.memory / GIB:.0f} GiB) instead of {plan.micro_batch} x "
            f"{plan.accumulation}; with train.global_batch_size: {plan.global_batch}, micro_batch_size: auto decides it"
        )


def _sharding(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Sharding that costs communication and saves no memory that is needed; what has no effect without it."""
    gpu, shape = plan.gpu, plan.shape
    if recipe.distributed.fsdp in ("auto", "none") or not plan.sharded or gpu is None or shape is None:
        return
    setting, checkpointing = Setting.of(recipe, plan), bool(plan.gradient_checkpointing)
    whole = setting.memory(plan.micro_batch, False, checkpointing)
    if whole is not None and setting.fits(plan.micro_batch, False, checkpointing):
        gathered = format_bytes(round(gathered_bytes(shape) * plan.accumulation))
        yield (
            f"distributed.fsdp: {recipe.distributed.fsdp} gathers {gathered} of weights per step on each GPU, and the "
            f"whole state fits (about {whole.total / GIB:.0f} of {gpu.memory / GIB:.0f} GiB): set "
            "distributed.fsdp: auto"
        )


def _hybrid_sharding(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Sharding within each node, where its state fits and the links between nodes bound the step."""
    gpu, hybrid = plan.gpu, recipe.distributed.model_copy(update={"fsdp": "hybrid_shard"})
    if gpu is None or plan.bound is None or plan.memory is None or not plan.sharded or plan.replicas > 1:
        return
    if plan.per_node in (None, 1, plan.processes) or plan.processes % plan.per_node:
        return
    setting = Setting.of(recipe.model_copy(update={"distributed": hybrid}), plan)
    chosen = choose(setting, Recorded())
    how = chosen.micro_batch, True, bool(chosen.checkpointing)
    memory, bound = setting.memory(*how), setting.bound(*how)
    whole_fits = setting.fits(plan.micro_batch, False, bool(plan.gradient_checkpointing))
    if memory is None or bound is None or whole_fits or not setting.fits(*how):
        return
    if (faster := 1 - bound.seconds / plan.bound.seconds) >= MIN_HYBRID_GAIN:
        yield (
            f"distributed.fsdp: hybrid_shard shards over the {plan.per_node} GPUs of each node and is {faster:.0%} "
            f"faster by the plan; a step then takes about {memory.total / GIB:.0f} of {gpu.memory / GIB:.0f} GiB"
        )


def _context(recipe: Recipe, plan: Plan) -> Iterator[str]:
    length, shape = recipe.data.sequence_len, plan.shape
    if shape and shape.context and length > shape.context:
        yield f"data.sequence_len {length} exceeds the base model's context length of {shape.context}"


def _small_epoch(recipe: Recipe, plan: Plan) -> Iterator[str]:
    rows = plan.volume.rows if plan.volume else 0
    if rows and rows < plan.global_batch:
        ways = [_smaller_batch(recipe), "use fewer GPUs" if plan.processes > 1 else None, "give more data"]
        yield (
            f"one epoch ({rows} rows) is smaller than one global batch ({plan.global_batch}): "
            f"every step sees rows more than once; {next(way for way in ways if way)}"
        )


def _too_long(recipe: Recipe, plan: Plan) -> Iterator[str]:
    lost = plan.volume.dropped.get("too_long", 0.0) if plan.volume else 0.0
    if lost < MAX_DROPPED_SHARE:
        return
    room = plan.shape is None or not plan.shape.context or recipe.data.sequence_len < plan.shape.context
    ways = ["raise data.sequence_len"] if room else ["use a base with a longer context"]
    ways += ["set data.too_long: truncate"] if isinstance(recipe.data, SFTData) else []
    length = recipe.data.sequence_len
    yield f"{lost:.0%} of the rows are longer than data.sequence_len {length} and are dropped: {', or '.join(ways)}"


def epochs_rounded_up(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Warns if whole steps add epochs. Also called at the start of a run."""
    requested, volume = recipe.num_epochs, plan.volume
    if requested is None or plan.epochs is None or plan.total_steps is None or not volume or not volume.rows:
        return
    if plan.epochs > requested * (1 + EPOCHS_TOLERANCE):
        steps = f"{plan.total_steps:,} whole step(s) of {plan.global_batch:,} rows"
        way = _smaller_batch(recipe) or "give more data"
        yield f"{requested:g} epoch(s) of {volume.rows:,} rows are rounded up to {plan.epochs:.3g} by {steps}: {way}"


def _max_steps(recipe: Recipe, plan: Plan) -> Iterator[str]:
    steps, epochs = recipe.train.max_steps, plan.epochs
    if steps is None or epochs is None:
        return
    usual = DEFAULT_EPOCHS[recipe.method]
    if epochs > MAX_EPOCHS_RATIO * usual:
        yield (
            f"train.max_steps: {steps:,} are {epochs:,.3g} epochs, the default is {usual:g}: the model will "
            "memorize the rows; lower it, or set it to null and train.num_epochs instead"
        )


def _few_steps(recipe: Recipe, plan: Plan) -> Iterator[str]:
    if plan.total_steps is None or plan.total_steps >= MIN_STEPS or recipe.train.max_steps is not None:
        return
    lower = _smaller_batch(recipe)
    yield f"only {plan.total_steps} steps: {f'{lower}, or ' if lower else ''}raise train.num_epochs"


def _patience(recipe: Recipe, plan: Plan) -> Iterator[str]:
    patience = recipe.train.early_stopping_patience
    if patience is None or plan.total_steps is None or plan.evaluate_every is None:
        return
    evaluations = math.ceil(plan.total_steps / plan.evaluate_every)
    if patience >= evaluations - 1:  # the first is always best, and the run ends after the last
        yield (
            f"train.early_stopping_patience: {patience} cannot end a run of {evaluations} evaluation(s): lower it, or "
            "lower evaluation.every_steps"
        )


def _validation(recipe: Recipe, plan: Plan) -> Iterator[str]:
    data = recipe.data
    if plan.volume is None or recipe.evaluation is None:
        return
    held = plan.volume.validation_rows
    where, size = "data.validation_sources" if data.validation_sources else "data.validation_size", data.validation_size
    little = isinstance(size, float) and not data.validation_sources and held / size < SMALL_DATASET_ROWS
    if held == 0 and not size:
        yield "there are no validation rows: overfitting cannot be detected; set data.validation_size"
    elif little:
        yield f"only {held} validation rows, and the data set is small: interpret the evaluation with care"
    elif held < MIN_VALIDATION_ROWS:
        yield f"only {held} validation rows: their loss is mostly noise; raise {where}"
    elif held > MAX_VALIDATION_ROWS:
        yield f"{held:,} validation rows are read at every evaluation; a few thousand are enough: lower {where}"
    packed = isinstance(data, SFTData) and data.packing
    if not data.validation_sources and not packed and plan.volume.rows and held > plan.volume.rows:
        yield "there are more validation rows than training rows; lower data.validation_size"


RULES = (
    _end_token,
    _too_long,
    _memory,
    _learning_rate,
    _warm_up,
    _zero_rate_tail,
    _throughput,
    _sharding,
    _hybrid_sharding,
    _context,
    _small_epoch,
    epochs_rounded_up,
    _max_steps,
    _few_steps,
    _patience,
    _validation,
)
