"""The sections of a recipe that say what is trained on what: `model`, `chat`, `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "user", "assistant", "tool"]
NonEmpty = Annotated[str, Field(pattern=r"\S")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]*\S[^\r\n]*$")]  # stands in one line of a script
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
SLURM_WORD = r"^[^\s\"'#\\\x00]+$"
SLURM_OPTION = r"^--[a-z][a-z0-9-]*(=[^\s\"'#\\\x00]+)?$"
VariableName = Annotated[str, Field(pattern=VARIABLE_NAME)]
SlurmWord = Annotated[str, Field(pattern=SLURM_WORD)]
SlurmOption = Annotated[str, Field(pattern=SLURM_OPTION)]
Value = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]  # a billion is a mistake that should not become an overflow


class Section(BaseModel):
    """Frozen and strict: unknown keys are errors, values are never coerced."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class LoraSection(Section):
    """Train a low-rank adapter (Hu et al., 2021, arXiv:2106.09685) instead of all weights."""

    type: Literal["lora"] = "lora"
    """Kind of adapter."""
    r: Count = 16
    """Rank of the update matrices."""
    alpha: float = Field(default=32, gt=0)
    """Scale of the update: it is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: NonEmpty | Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Names of the layers that get an adapter, or `all-linear`."""


class ModelSection(Section):
    """The base model and how it is held in memory."""

    base: NonEmpty
    """Hub id or folder of the base model; for DPO the result of SFT."""
    revision: NonEmpty | None = None
    """Hub commit, branch or tag to pin."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave false unless you have read it."""
    random_init: bool = False
    """Start from random weights: `base` is then a folder with config.json and a tokenizer only."""
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    """Attention kernel; auto takes flash where it is installed and a GPU is there, else sdpa."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the computation and of final/; master weights are always float32."""
    adapter: LoraSection | None = None
    """Train an adapter instead of all weights."""


class ChatSection(Section):
    """How conversations become text: the template and its tokens."""

    template: NonEmpty | None = None
    """Name of a chat template under data_templates/chat/, or a file of that kind; null takes what the base was
    trained with, else chatml."""
    eos_token: NonEmpty | None = None
    """End token; null takes the template's."""
    pad_token: NonEmpty | None = None
    """Padding token; null takes the template's."""
    new_tokens: Literal["auto", "reserved", "resize"] = "auto"
    """Where template tokens unknown to the tokenizer go: renamed reserved slots, or new rows; auto prefers slots."""
    default_system: str | dict[str, str] | None = None
    """System message for conversations without one: a text, or a text per language code."""


class Source(Section):
    """One source of rows."""

    path: NonEmpty
    """File, glob, folder, or hub id of a data set."""
    split: NonEmpty = "train"
    """Split of a hub data set."""
    subset: NonEmpty | None = None
    """Configuration of a hub data set."""
    revision: NonEmpty | None = None
    """Hub commit, branch or tag to pin."""
    format: NonEmpty = "auto"
    """Name of a mapping under data_templates/formats/, a file of that kind, or auto."""
    messages_field: NonEmpty | None = None
    """Column that holds the list of messages."""
    role_field: NonEmpty | None = None
    """Key of a message that holds its role."""
    content_field: NonEmpty | None = None
    """Key of a message that holds its text."""
    roles: dict[str, Role] | None = None
    """The data's role names and what they are here, e.g. {utente: user}."""
    system_field: NonEmpty | None = None
    """Column that holds a system message."""
    tools_field: NonEmpty | None = None
    """Column that holds the tools on offer: a list of schemas, or the list as JSON text (default `tools`)."""
    prompt_field: NonEmpty | None = None
    """Column that holds the instruction or the prompt."""
    input_field: NonEmpty | None = None
    """Column that holds further input to the instruction."""
    response_field: NonEmpty | None = None
    """Column that holds the answer."""
    chosen_field: NonEmpty | None = None
    """Column that holds the better answer."""
    rejected_field: NonEmpty | None = None
    """Column that holds the worse answer."""
    language: NonEmpty | None = None
    """Language code of all rows; null takes each row's own; auto too, and detects it where a row has none."""
    language_field: NonEmpty | None = None
    """Column that holds a row's language code; null looks for `lang` and `language`."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often the source is seen in an epoch: 2.0 twice, 0.5 a fresh half each epoch."""
    max_rows: Count | None = None
    """Read at most this many rows."""
    min_score: float | None = None
    """Drop rows whose `score_field` is below this."""
    score_field: NonEmpty | None = None
    """Column that holds a row's quality score."""
    private: bool = False
    """Leave no trace of this source in final/ or its card."""


class DataSection(Section):
    """What SFT and DPO share about data."""

    sequence_len: int = Field(default=4096, ge=8, le=10_000_000)
    """Longest sequence in tokens; with packing, the length of a row."""
    validation_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Rows (whole number) or share (fraction) held out for evaluation, stratified by language; 0 holds none out."""
    validation_sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """Sources for evaluation instead of a split."""
    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """The sources that are trained on."""


class SFTData(DataSection):
    """Data of supervised fine-tuning."""

    packing: bool = True
    """Lay several conversations end to end in one row, isolated from each other."""
    roles_to_train: Annotated[tuple[Role, ...], Field(strict=False, min_length=1)] = ("assistant",)
    """Roles whose text the model learns to write."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """Which end tokens are learned: of each trained turn, of all turns, of the last trained turn, none."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a conversation beyond sequence_len; truncate cuts after a complete turn."""


class DPOData(DataSection):
    """Data of preference training. Nothing is truncated: a cut answer would lose its end token."""

    sequence_len: int = Field(default=1024, ge=8, le=10_000_000)
    """Longest prompt plus answer in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """What happens to a pair whose prompt and longer answer exceed sequence_len."""


class ClusterSection(Section):
    """Where `nesso-tune launch --slurm` sends the run; training itself does not read it."""

    nodes: Count = 1
    """Machines."""
    gpus_per_node: Count = 1
    """GPUs, and so processes, on each machine."""
    cpus_per_gpu: Count = 8
    """CPU cores for each process; also its number of threads."""
    partition: SlurmWord | None = None
    """Slurm partition."""
    account: SlurmWord | None = None
    """Slurm account."""
    time: SlurmWord | None = None
    """Longest time of a job, e.g. 24:00:00."""
    save_before_s: Count = 300
    """Seconds before the time is up at which the run is asked to save and to go on in a new job."""
    modules: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Environment modules that are loaded."""
    container: Line | None = None
    """Container image that the run is started in (srun --container-image)."""
    env: dict[VariableName, Value] = {}
    """Environment variables of the job. No secrets: they stand in the job's file."""
    python: Line = "python"
    """The interpreter on the nodes that has nesso-tune."""
    offline: bool = True
    """The nodes have no network: base and data must be in the cache before."""
    extra: Annotated[tuple[SlurmOption, ...], Field(strict=False)] = ()
    """Further lines for sbatch, e.g. --exclusive."""
