"""The sections of a recipe that say what is trained, and where: `model`, `chat`, `cluster`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nesso_tune.recipes.paths import FilePath

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

    type: Literal["lora", "dora", "qlora"] = "lora"
    """lora; dora also learns the length of every output's weights (Liu et al., 2024, arXiv:2402.09353); qlora is lora
    over a base held in 4 bits (Dettmers et al., 2023, arXiv:2305.14314), in one process."""
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

    base: FilePath
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

    template: FilePath | None = None
    """Name of a chat template under data_templates/chat/, or a file of that kind; null takes what the base was
    trained with, else chatml. A base whose own Jinja template writes neither that nor another of ours is refused until
    this key says what to use."""
    eos_token: NonEmpty | None = None
    """End token; null takes the template's."""
    pad_token: NonEmpty | None = None
    """Padding token; null takes the template's."""
    new_tokens: Literal["auto", "reserved", "resize"] = "auto"
    """Where template tokens unknown to the tokenizer go: renamed reserved slots, or new rows; auto prefers slots."""
    default_system: str | Annotated[dict[str, str], Field(min_length=1)] | None = None
    """System message for conversations without one: a text, or a text per language code."""


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
