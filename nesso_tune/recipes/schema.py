"""The recipe: one validated file, one run."""

from __future__ import annotations

from io import StringIO
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from nesso_tune.lr_schedule import Shape
from nesso_tune.recipes.builtin import FilePath, MetricName
from nesso_tune.recipes.rules import lint
from nesso_tune.recipes.sections import ChatSection, ClusterSection, Count, DPOData, ModelSection, Section, SFTData

Share = Annotated[float, Field(gt=0, lt=1)]
Interval = Count | Share  # steps, or a share of the run
Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]
LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class Schedule(Section):
    """How the learning rate moves: warm-up from 0, decay to `min_ratio`, then constant."""

    type: Shape = "cosine"
    """Shape of the decay."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of all steps that warm up (default 0.03)."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """Steps that warm up, instead of a share."""
    constant_ratio: float | None = Field(default=None, gt=0, le=1)
    """The decay ends at this share of all steps and stays constant for the rest (default 1.0: it ends with the run).
    Below 1.0 it needs `min_ratio`, at which the rest is trained."""
    min_ratio: float | None = Field(default=None, ge=0, le=1)
    """What the decay ends at, as a share of the peak (default 0.0)."""


class TrainSection(Section):
    """The optimisation."""

    num_epochs: float | None = Field(default=None, gt=0, le=100_000)
    """Passes over the data (default 3 for SFT, 2 for DPO)."""
    max_steps: Count | None = None
    """Optimizer steps, instead of passes over the data."""
    micro_batch_size: Count = 1
    """Rows (packed rows in SFT, pairs in DPO) that one device computes at a time."""
    gradient_accumulation_steps: Count | None = None
    """Micro batches per optimizer step on each device (default 1)."""
    global_batch_size: Count | None = None
    """Rows per optimizer step over all devices; accumulation then follows from the number of devices."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Peak learning rate; auto takes one by method and model size, and the plan shows it."""
    optimizer: Literal["adamw_torch_fused", "adamw_torch"] = "adamw_torch_fused"
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), with one fused kernel or without."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; norms and biases have none."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm; null never clips."""
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """When loss or gradient norm leap far above those of the last 128 steps: say so, make no update of that step, or
    end the run. NaN and infinity always end it."""
    best_metric: MetricName | None = None
    """final/ takes the weights of the evaluation that is best by this metric: eval_loss, eval_loss/it, stop_rate,
    eval_rewards/accuracies and the like; the checkpoint is kept. null takes the last weights."""
    early_stopping_patience: Count | None = None
    """End the run after this many evaluations without a better best_metric."""
    profile: bool = False
    """Write a trace of a few steps into output_dir/profile/: where their time goes, for Perfetto or chrome://tracing."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass to save memory; auto does so where a step would not fit otherwise."""
    torch_compile: Literal["auto"] | bool = "auto"
    """Compile the decoder layers for packed rows of one constant length (SFT); auto does so on a CPU where the run is
    long enough to win back the time that it takes."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""


class DPOSection(Section):
    """Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290)."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is held to the reference."""
    loss: dict[LossName, Annotated[float, Field(gt=0)]] = Field(default={"sigmoid": 1.0}, min_length=1)
    """Weights by loss name; several are added up, e.g. {sigmoid: 1.0, sft: 0.2}. Each is a mean over the pairs of an
    optimizer step; sft is a mean over the tokens of their chosen answers; aot and aot_unpaired sort the pairs, and need
    the whole step in one micro batch."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels; used by robust, exo_pair, aot and aot_unpaired."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411); null weighs all alike."""
    reference: Literal["initial"] = "initial"
    """The frozen reference: the weights that the run starts from."""


class DistributedSection(Section):
    """How several processes share the work."""

    fsdp: Literal["auto", "full_shard", "none"] = "auto"
    """full_shard spreads weights, gradients and optimizer over all processes (FSDP2); auto does so with several."""
    state_dict: Literal["full", "sharded"] = "full"
    """How checkpoints are written: full gathers the state in one process, sharded writes each process's share at once;
    any number of processes reads both."""
    timeout_s: Count = 1800
    """Seconds after which a collective operation that does not finish ends the run."""

    def shards(self, processes: int) -> bool:
        """Whether weights, gradients and optimizer are spread over the processes; one process has nothing to share."""
        return processes > 1 and self.fsdp != "none"

    def in_shards(self, processes: int) -> bool:
        """Whether each process writes its own share of a checkpoint."""
        return self.shards(processes) and self.state_dict == "sharded"


class CheckpointSection(Section):
    """Checkpoints to resume from."""

    every_steps: Interval = 0.25
    """Interval: steps, or a share of the run."""
    keep: Count = 3
    """Newest checkpoints that are kept."""


class EvaluationSection(Section):
    """Loss on the validation rows, and answers to some of their prompts. Always at the end too."""

    every_steps: Interval = 0.1
    """Interval: steps, or a share of the run."""
    samples: int = Field(default=8, ge=0)
    """Validation prompts that are answered greedily, balanced over languages: docs/metrics.md says what is measured."""
    train_samples: int = Field(default=0, ge=0)
    """Training prompts that are answered at the end of the run, to see what was memorised."""
    max_new_tokens: Count = 256
    """Longest answer in tokens; a longer one counts as not stopped."""


class LoggingSection(Section):
    """What is written while training."""

    every_steps: Interval = 10
    """Interval of lines in metrics.jsonl: steps, or a share of the run."""
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False)] = ()
    """Experiment trackers that get the same numbers."""


class BaseRecipe(Section):
    """What both methods share."""

    output_dir: FilePath
    """The run directory: all that a run leaves."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of everything random."""
    model: ModelSection
    """The base model."""
    chat: ChatSection = ChatSection()
    """The chat template and its tokens."""
    train: TrainSection = TrainSection()
    """The optimisation."""
    distributed: DistributedSection = DistributedSection()
    """How several processes share the work."""
    cluster: ClusterSection | None = None
    """Where `nesso-tune launch --slurm` sends the run."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints."""
    evaluation: EvaluationSection | None = EvaluationSection()
    """Evaluation while training; null turns it off."""
    logging: LoggingSection = LoggingSection()
    """Logging."""

    @model_validator(mode="after")
    def _no_inert_or_contradictory_knobs(self) -> BaseRecipe:
        findings = lint(self.model_dump(mode="json", exclude_unset=True))
        if findings:
            raise ValueError("\n".join(f"{'.'.join(map(str, f.path))}: {f.what}; {f.remedy}" for f in findings))
        return self

    def to_yaml(self) -> str:
        """The whole recipe, defaults filled in, as YAML that loads again."""
        return as_yaml(self.model_dump(mode="json"))

    @property
    def num_epochs(self) -> float | None:
        """Passes over the data, or None where `train.max_steps` decides."""
        if self.train.max_steps is not None:
            return None
        return self.train.num_epochs or DEFAULT_EPOCHS[self.method]  # type: ignore[attr-defined]


def as_yaml(raw: dict[str, Any]) -> str:
    """Plain data as YAML."""
    out = StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(_escaped(raw), out)
    return out.getvalue()


def _escaped(value: Any) -> Any:
    """The same data, with texts that hold line breaks or control characters marked to be written as escapes."""
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value


DEFAULT_EPOCHS = {"sft": 3.0, "dpo": 2.0}


class SFTRecipe(BaseRecipe):
    """Supervised fine-tuning on conversations."""

    method: Literal["sft"] = "sft"
    """The training method."""
    data: SFTData
    """The conversations."""


class DPORecipe(BaseRecipe):
    """Preference training on pairs of answers."""

    method: Literal["dpo"] = "dpo"
    """The training method."""
    data: DPOData
    """The preference pairs."""
    dpo: DPOSection = DPOSection()
    """The preference loss."""


Recipe = SFTRecipe | DPORecipe
RECIPES: dict[str, type[SFTRecipe] | type[DPORecipe]] = {"sft": SFTRecipe, "dpo": DPORecipe}


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, defaults filled in: what is hashed, compared and recorded."""
    return recipe.model_dump(mode="json")
