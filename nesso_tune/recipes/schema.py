"""The recipe: one validated YAML file per run. `sections.py` has the sections `model`, `chat`, `cluster`, `data`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from io import StringIO
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from nesso_tune.errors import Problem, RecipeError
from nesso_tune.lr_schedule import ScheduleType
from nesso_tune.recipes.builtin import FilePath, MetricName, local_path, reader_file
from nesso_tune.recipes.error_messages import validated
from nesso_tune.recipes.rules import lint, remove_excluded
from nesso_tune.recipes.sections import (
    CardSection,
    ChatSection,
    ClusterSection,
    Count,
    DPOData,
    ModelSection,
    Section,
    SFTData,
)
from nesso_tune.recipes.yaml_source import Document, KeyPath, plain_data, set_values

Share = Annotated[float, Field(gt=0, lt=1)]
Interval = Count | Share  # steps, or a fraction of the run
Tracker = Literal["trackio", "wandb", "tensorboard", "mlflow"]
LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


class Schedule(Section):
    """Learning-rate schedule: linear warm-up from 0, decay to `min_ratio`, then constant."""

    type: ScheduleType = "cosine"
    """Shape of the decay."""
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Warm-up as a fraction of all steps (default 0.03)."""
    warmup_steps: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """Warm-up in steps, instead of a fraction."""
    constant_ratio: float | None = Field(default=None, gt=0, le=1)
    """Fraction of all steps at which the decay ends; the learning rate is constant afterwards (default 1.0: the decay
    ends with the run). Values below 1.0 require `min_ratio`, the level of the constant part."""
    min_ratio: float | None = Field(default=None, ge=0, le=1)
    """Final learning rate of the decay, as a fraction of the peak (default 0.0)."""


class TrainSection(Section):
    """Optimisation: steps, batch size, optimizer and learning rate."""

    num_epochs: float | None = Field(default=None, gt=0, le=100_000)
    """Number of passes over the data (default 3 for SFT, 2 for DPO)."""
    max_steps: Count | None = None
    """Number of optimizer steps, instead of `num_epochs`."""
    micro_batch_size: Count | Literal["auto"] = 1
    """Rows per device and forward pass (packed rows in SFT, pairs in DPO). auto takes the most that fit into the memory
    of the GPU, by the plan and then by one forward and backward pass before the first step, and keeps the number when
    the run resumes; without a GPU, rows of at most 4,096 tokens together. It requires `global_batch_size`."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches per optimizer step on each device (default 1)."""
    global_batch_size: Count | None = None
    """Rows per optimizer step over all devices. Gradient accumulation is then derived from the number of devices."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Peak learning rate. auto selects one by method and model size; the plan shows the value."""
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit"] = "adamw_torch_fused"
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101), with or without the fused kernel. adamw_8bit keeps its two
    moments in 8 bits (Dettmers et al., 2022, arXiv:2110.02861; bitsandbytes): 10 bytes of state per weight instead of
    16, unsharded."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment (β₁)."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of the second moment (β₂)."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Term added to the denominator of the update (ε)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay. Not applied to norms and biases."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Maximum gradient norm for clipping. null disables clipping."""
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """Action on a spike of the loss or the gradient norm over the 128-step window: warn and apply the update, skip the
    update, or stop the run. NaN and infinity always stop the run."""
    best_metric: MetricName | None = None
    """Metric that selects the weights in final/, e.g. eval_loss, eval_loss/it, stop_rate or eval_rewards/accuracies.
    The checkpoint of the best evaluation is kept. null uses the last weights."""
    early_stopping_patience: Count | None = None
    """Stop the run after this number of evaluations without an improvement of `best_metric`."""
    profile: bool = False
    """Write a profiler trace of a few steps to output_dir/profile/, for Perfetto or chrome://tracing."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass to save memory. auto enables this if a step would not fit
    otherwise, and with `micro_batch_size: auto` if the larger micro batch is faster by the plan."""
    torch_compile: Literal["auto"] | bool = "auto"
    """Compile the decoder layers with torch.compile, for packed rows of constant length (SFT). auto enables this if the
    run is long enough to amortise the compilation time and a compiler is installed (on GPUs, Triton)."""
    deterministic: bool = False
    """Use deterministic operations only on GPUs, such as a flash backward pass without atomic additions: a repeated or
    resumed run then gives the same bits on the same machine. Steps are slower. CPU runs are deterministic anyway."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""


class DPOSection(Section):
    """Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290)."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the penalty for deviating from the reference model (β)."""
    loss: dict[LossName, Annotated[float, Field(gt=0)]] = Field(default={"sigmoid": 1.0}, min_length=1)
    """Weight per loss name; the total is the weighted sum, e.g. {sigmoid: 1.0, sft: 0.2}. Each loss is a mean over the
    pairs of an optimizer step, except sft, a mean over the tokens of the chosen responses. aot and aot_unpaired sort
    the pairs, and require the whole step in one micro-batch."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed fraction of flipped labels. Used by robust, exo_pair, aot and aot_unpaired."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of tokens beyond the length of the shorter response (LD-DPO, arXiv:2409.06411). null weights all tokens
    equally."""
    reference: Literal["initial"] = "initial"
    """Reference model. initial is a frozen copy of the weights at the start of the run."""


class DistributedSection(Section):
    """Sharding and communication of several processes."""

    fsdp: Literal["auto", "full_shard", "hybrid_shard", "none"] = "auto"
    """full_shard shards parameters, gradients and optimizer state over all processes (FSDP2). hybrid_shard shards them
    over the processes of each node and replicates them across nodes: links between nodes then carry gradients only.
    none replicates them (DDP). auto shards over all processes on several GPUs if a step with the whole state would take
    more than 70 % of the memory of one, also with the gradient checkpointing that auto may choose; if sharding makes a
    step at least 10 % faster; or if `state_dict` is sharded. It never does with `model.adapter.type: qlora` or
    `train.optimizer: adamw_8bit`, whose state cannot be sharded. The choice is kept when the run resumes."""
    state_dict: Literal["full", "sharded"] = "full"
    """Format of checkpoints. full gathers the state on rank 0; sharded writes one shard per process in parallel. Both
    can be loaded with any number of processes."""
    timeout_s: Count = 1800
    """Timeout of collective operations in seconds. A collective that takes longer ends the run."""


class CheckpointSection(Section):
    """Checkpoints for resuming a run. null saves none, except when a signal asks the run to stop."""

    every_steps: Interval = 0.25
    """Interval between checkpoints: steps, or a fraction of the run."""
    keep: Count = 3
    """Number of most recent checkpoints to keep."""
    asynchronous: Literal["auto"] | bool = "auto"
    """Copy the state to host memory and go on training while a thread writes, hashes and syncs the files. One write is
    in progress at most, and the end of the run waits for it. auto does so from 100 MB on, if the copy, whose memory is
    kept, takes at most half of the free memory at the first save."""


class EvaluationSection(Section):
    """Validation loss, and generated responses to validation prompts. Always runs at the end of training, too."""

    every_steps: Interval = 0.1
    """Interval between evaluations: steps, or a fraction of the run."""
    samples: int = Field(default=8, ge=0)
    """Number of validation prompts to answer with greedy decoding, balanced over languages. docs/metrics.md lists the
    metrics."""
    train_samples: int = Field(default=0, ge=0)
    """Number of training prompts to answer at the end of the run, to measure memorisation."""
    max_new_tokens: Count = 256
    """Maximum response length in tokens. A response that reaches it counts as not stopped."""
    gate: FilePath | None = None
    """Publish final/ only if the model is not worse than the weights that the run starts from: default, or a gate file
    (docs/evaluation.md). A refused model stays in candidate/, and the command ends with exit code 7."""


class LoggingSection(Section):
    """Logging of training metrics."""

    every_steps: Interval = 10
    """Interval of training lines in metrics.jsonl: steps, or a fraction of the run."""
    report_to: Annotated[tuple[Tracker, ...], Field(strict=False)] = ()
    """Experiment trackers that receive the same metrics."""


class BaseRecipe(Section):
    """Keys common to both methods."""

    output_dir: FilePath
    """Run directory: all files of the run are written here."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Random seed of data order, sampling, dropout and new weights."""
    model: ModelSection
    """The base model, its precision and its adapter."""
    chat: ChatSection = ChatSection()
    """The chat template and its special tokens."""
    train: TrainSection = TrainSection()
    """Optimisation: steps, batch size, optimizer and learning rate."""
    distributed: DistributedSection = DistributedSection()
    """Sharding and communication of several processes."""
    cluster: ClusterSection | None = None
    """Slurm job settings for `nesso-tune launch --slurm`."""
    checkpoint: CheckpointSection | None = CheckpointSection()
    """Checkpoints for resuming a run. null saves none, except when a signal asks the run to stop."""
    evaluation: EvaluationSection | None = EvaluationSection()
    """Evaluation during training. null disables it."""
    logging: LoggingSection = LoggingSection()
    """Logging of training metrics."""
    card: CardSection = CardSection()
    """Facts for the model card. They can change at any time: `nesso-tune card` and `nesso-tune export` read them from
    the run's recipe.yaml."""

    @model_validator(mode="after")
    def _no_inert_or_contradictory_knobs(self) -> BaseRecipe:
        findings = lint(self.model_dump(mode="json", exclude_unset=True))
        if findings:
            raise ValueError("\n".join(f"{'.'.join(map(str, f.path))}: {f.what}; {f.remedy}" for f in findings))
        return self

    def to_yaml(self) -> str:
        """The whole recipe with defaults filled in, as YAML that `load_recipe` reads."""
        return as_yaml(self.model_dump(mode="json"))

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """The recipe with other values, validated as a file is.

        Args:
            changes: values by dotted key, e.g. `{"train.learning_rate": 5e-4}`; list items by index. If two keys are
                mutually exclusive (`train.max_steps`, `train.num_epochs`), the changed one replaces the other.

        Raises:
            RecipeError: with all problems, each with its key.
        """
        document = Document("recipe", plain_data(self), is_text=False)
        set_values(document, changes, "changes")
        remove_excluded(document.value, changes)
        recipe = validated(document, type(self), document.value)
        check_files(recipe, document)
        return recipe

    def __repr__(self) -> str:
        sources = len(self.data.sources)  # type: ignore[attr-defined]
        of_data = f"{sources} source{'' if sources == 1 else 's'}"
        return f"{type(self).__name__}(base={self.model.base!r}, {of_data}, output_dir={self.output_dir!r})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """The keys that are set, as YAML; without styles, so that a notebook keeps its look."""
        return f"<pre>{escape(as_yaml(plain_data(self)))}</pre>"

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether weights are kept in 4 bits, or moments in 8."""
        in_four_bits = self.model.adapter is not None and self.model.adapter.type == "qlora"
        return in_four_bits or self.train.optimizer == "adamw_8bit"

    @property
    def checkpoints_kept(self) -> int:
        """Number of checkpoints that are kept; without `checkpoint`, that of a stop request."""
        return 1 if self.checkpoint is None else self.checkpoint.keep

    @property
    def num_epochs(self) -> float | None:
        """Number of passes over the data; None if `train.max_steps` is set."""
        if self.train.max_steps is not None:
            return None
        return self.train.num_epochs or DEFAULT_EPOCHS[self.method]  # type: ignore[attr-defined]


def check_files(recipe: BaseRecipe, document: Document) -> None:
    """Raises RecipeError if a template, gate, format, reader or tools file is missing."""
    gate = None if recipe.evaluation is None else recipe.evaluation.gate
    named: dict[KeyPath, str | None] = {("chat", "template"): recipe.chat.template, ("evaluation", "gate"): gate}
    for section in ("sources", "validation_sources"):
        for i, source in enumerate(getattr(recipe.data, section)):  # type: ignore[attr-defined]
            named[("data", section, i, "format")] = reader_file(source.format)
            named[("data", section, i, "tools_file")] = source.tools_file
    missing = [
        Problem(document.where(path), f"`{'.'.join(map(str, path))}` names a file that does not exist: {name}",
                "correct the path") for path, name in named.items()
        if name is not None and name.endswith((".yaml", ".yml", ".py", ".json"))
        and not os.path.isfile(local_path(name))
    ]  # fmt: skip
    if missing:
        raise RecipeError(missing)


def as_yaml(raw: dict[str, Any]) -> str:
    """Plain data as YAML."""
    out = StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.dump(_escaped(raw), out)
    return out.getvalue()


def _escaped(value: Any) -> Any:
    """The same data, with strings that contain non-printable characters marked for double quotes and escapes."""
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
    """Conversations to train on."""


class DPORecipe(BaseRecipe):
    """Direct preference optimisation on pairs of responses."""

    method: Literal["dpo"] = "dpo"
    """The training method."""
    data: DPOData
    """Preference pairs to train on."""
    dpo: DPOSection = DPOSection()
    """The preference loss."""


Recipe = SFTRecipe | DPORecipe
RECIPES: dict[str, type[SFTRecipe] | type[DPORecipe]] = {"sft": SFTRecipe, "dpo": DPORecipe}


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with defaults filled in, as it is hashed, compared and recorded."""
    return recipe.model_dump(mode="json")
