"""The sections of a recipe that say what is trained, and where: `model`, `chat`, `cluster`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nesso_tune.recipes.builtin import FilePath, PathName

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


Plain = str | int | float | bool
AUTO = "auto"  # of a source's format or language


class Rule(Section):
    """What holds for the rows of one language of a source."""

    keep: bool = True
    """false drops them."""
    min_score: float | None = None
    """Drop those whose `score_field` is below this; instead of the source's."""
    weight: float | None = Field(default=None, gt=0, le=1000)
    """How often they are seen in an epoch, at least one row; instead of the source's."""


class Source(Section):
    """One source of rows."""

    path: FilePath
    """File, glob, folder, or hub id of a data set."""
    split: NonEmpty = "train"
    """Split of a hub data set."""
    subset: NonEmpty | None = None
    """Configuration of a hub data set."""
    revision: NonEmpty | None = None
    """Hub commit, branch or tag to pin."""
    alias: PathName | None = None
    """What reports and shares call this source; null: its path."""
    format: FilePath = "auto"
    """Name of a mapping under data_templates/formats/, a file of that kind, `FILE.py:FUNCTION` (a reader of your own,
    which makes a row of a known format of any row), or auto."""
    reads: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()
    """Files that your own reader opens: a change of one of them is then seen. Modules of your own that it imports by
    name are seen without this; what it gets from anywhere else is not."""
    where: dict[str, Plain | Annotated[tuple[Plain, ...], Field(strict=False, min_length=1)]] = Field(default={})
    """Only rows whose columns have these values, e.g. {source: [a, b]}; the others count as `not_selected`."""
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
    tools_file: FilePath | None = None
    """JSON file with the tools on offer in rows that name none themselves."""
    prompt_field: NonEmpty | None = None
    """Column that holds the instruction or the prompt."""
    input_field: NonEmpty | None = None
    """Column that holds further input to the instruction."""
    response_field: NonEmpty | None = None
    """Column that holds the answer."""
    text_field: NonEmpty | None = None
    """Column that holds a plain text, learned whole (format completion)."""
    chosen_field: NonEmpty | None = None
    """Column that holds the better answer."""
    rejected_field: NonEmpty | None = None
    """Column that holds the worse answer."""
    choice_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Columns of two answers of which one is better (format choice)."""
    label_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)] | None = None
    """Columns that say which one: a label, or the votes of several people."""
    labels: Annotated[tuple[Plain, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """What label_fields say for the first answer and what for the second, e.g. [1, 2]; anything else is no vote."""
    language: NonEmpty | None = None
    """Language code of all rows; null takes each row's own; auto too, and detects it where a row has none."""
    language_field: NonEmpty | None = None
    """Column that holds a row's language code; null looks for `lang` and `language`."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often the source is seen in an epoch: 2.0 twice, 0.5 a fresh half each epoch, but at least one row."""
    max_rows: Count | None = None
    """Read at most this many rows."""
    min_score: float | None = None
    """Drop rows whose `score_field` is below this."""
    score_field: NonEmpty | None = None
    """Column that holds a row's quality score."""
    rules: dict[NonEmpty, Rule] = Field(default={})
    """What else holds for a language, e.g. {en: {min_score: 0.6}}; `other` stands for all languages not named."""
    private: bool = False
    """Only recipe.yaml names this source: in all else that a run writes it has a number, and no row of its files is
    shown, whoever else reads them. Counts, losses and languages are."""


class Decontamination(Section):
    """Drop rows that contain a text of an evaluation: n-gram overlap as in Tulu 3 (arXiv:2411.15124, §3.2)."""

    files: Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)]
    """Files with evaluation texts: JSON lines, JSON or Parquet."""
    fields: Annotated[tuple[NonEmpty, ...], Field(strict=False)] = ()
    """Their columns that hold the texts; empty looks for prompt, question, instruction, input and messages."""
    ngram: Annotated[int, Field(ge=2, le=100)] = 8
    """Words in a row that count as a match; a shorter text must be there as a whole."""
    overlap: float = Field(default=0.5, gt=0, le=1)
    """Share of an evaluation text's words in such matches from which a row is dropped."""


class CleanSection(Section):
    """What is done to rows before they are encoded. Each step is counted, and listed in data_report.json."""

    unicode: Literal["nfc"] | None = None
    """nfc: write every character the one composed way (Unicode NFC)."""
    invisible: Literal["keep", "remove"] = "keep"
    """remove: take out zero-width and control characters (tabs, line breaks and the joiners of emoji stay)."""
    empty_turns: Literal["keep", "remove", "drop"] = "keep"
    """Turns of user or system without text: kept, taken out, or the row dropped. Without an answer it always is."""
    role_order: Literal["drop", "merge", "keep"] = "drop"
    """Rows in which a role speaks twice in a row, a system message comes late, or a tool answers without a call:
    dropped, or the texts of such neighbours put together, or left as they are."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop: of rows with the same turns and tools, only the first stays."""
    near_duplicates: float | None = Field(default=None, ge=0.3, le=1)
    """Drop a row that shares this part of its three-word sequences with an earlier row (Jaccard, by MinHash)."""
    validation_overlap: Literal["keep", "drop"] = "keep"
    """drop: rows that ask the same as a held-out row are not trained on."""
    decontaminate: Decontamination | None = None
    """Drop rows that contain evaluation texts."""


class MixtureSection(Section):
    """What an epoch is made of, as shares of its tokens. Groups that have too much are sampled afresh each epoch."""

    by: Literal["language", "source"]
    """What the shares are of."""
    shares: Annotated[dict[PathName, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    """Share of each language, or of each source by alias or path; they add up to 1, 0 leaves a group out. `other`
    stands for all that are not named."""
    repeat: float = Field(default=1.0, ge=1, le=1000)
    """How often at most a row may be seen in an epoch; above 1 scarce groups are repeated instead of the others cut."""


class Limit(Section):
    """A figure from which preference data is suspicious."""

    warn: float | None = Field(default=None, ge=0)
    """Say so from here on."""
    fail: float | None = Field(default=None, ge=0)
    """End with an error from here on."""


class PreferenceSection(Section):
    """What is looked for in preference data, and from when on it is said or refused."""

    length_predicts: Limit = Limit(warn=0.7)
    """Share of pairs whose choice the answers' length alone tells (the longer always, or the shorter always)."""
    length_ratio: Limit = Limit(warn=1.5)
    """Tokens of the chosen answers over those of the rejected ones, or the other way round."""
    same_answers: Limit = Limit(warn=0.01)
    """Share of rows whose chosen and rejected answers are the same; they are dropped."""
    conflicting: Limit = Limit(warn=0.001)
    """Share of pairs whose chosen answer another pair rejects for the same prompt."""
    language_mismatch: Limit = Limit(warn=0.02)
    """Share of pairs with an answer in another language than the prompt."""
    too_long: Limit = Limit(warn=0.1)
    """Share of rows with an answer that does not fit into sequence_len; they are dropped."""


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
    clean: CleanSection = CleanSection()
    """What is done to rows before they are encoded."""
    mixture: MixtureSection | None = None
    """Shares of languages or sources in an epoch; null takes all rows, by the sources' weights."""


class SFTData(DataSection):
    """Data of supervised fine-tuning."""

    packing: bool = True
    """Lay several conversations end to end in one row, isolated from each other.

    A base that cannot keep them apart trains on one conversation a row all the same, which the run says.
    """
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
    preferences: PreferenceSection = PreferenceSection()
    """What is looked for in the pairs."""
