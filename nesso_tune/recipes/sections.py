"""Sections of a recipe: `model`, `chat`, `cluster` and `data`. `schema.py` holds the others and the recipe itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nesso_tune.errors import RecipeError
from nesso_tune.recipes.builtin import LICENSE, FilePath, PathName
from nesso_tune.recipes.cluster_rules import (
    LINE,
    MOUNT,
    SAVE_BEFORE_S,
    SLURM_OPTION,
    SLURM_WORD,
    VALUE,
    VARIABLE_NAME,
)
from nesso_tune.recipes.error_messages import validated
from nesso_tune.recipes.yaml_source import Document, plain_data

Role = Literal["system", "user", "assistant", "tool"]
NonEmpty = Annotated[str, Field(pattern=r"\S")]
Line = Annotated[str, Field(pattern=LINE)]  # written on one line of the job script, or of the card
VariableName = Annotated[str, Field(pattern=VARIABLE_NAME)]
SlurmWord = Annotated[str, Field(pattern=SLURM_WORD)]
SlurmOption = Annotated[str, Field(pattern=SLURM_OPTION)]
Value = Annotated[str, Field(pattern=VALUE)]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]  # larger values are mistakes and could overflow


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _SectionType
else:

    class _SectionType(type(BaseModel)):
        """Takes paths and NumPy's numbers in Python, and reports mistakes there as those of a file."""

        def __call__(cls, **keys: Any) -> Any:
            try:
                return super().__call__(**keys)
            except ValidationError:  # sections are kept: the data of another method is no data of this one
                document = Document(cls.__name__, plain_data(keys), is_text=False)
                return validated(document, cls, plain_data(keys, keep_sections=True))


class Section(BaseModel, metaclass=_SectionType):
    """Base of all sections: frozen and strict. Unknown keys are errors, and values are never coerced.

    Raises:
        RecipeError: with all mistakes, each with its key, if a section or recipe is built in Python.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    if not TYPE_CHECKING:  # type checkers know from `frozen` that keys cannot be set

        def __setattr__(self, key: str, value: object) -> None:
            what = "cannot be set, since sections and recipes are frozen"
            raise RecipeError(f"{type(self).__name__}.{key}", what, "make another recipe: recipe.replace({...})")

        def __delattr__(self, key: str) -> None:
            setattr(self, key, None)


class LoraSection(Section):
    """Train a low-rank adapter (Hu et al., 2021, arXiv:2106.09685) instead of all weights."""

    type: Literal["lora", "dora", "qlora"] = "lora"
    """Kind of adapter. dora also trains the magnitude of each output's weight vector (Liu et al., 2024,
    arXiv:2402.09353). qlora is LoRA on a base quantised to 4 bits (Dettmers et al., 2023, arXiv:2305.14314); with
    several processes, each holds the whole base (DDP)."""
    r: Count = 16
    """Rank of the update matrices."""
    alpha: float = Field(default=32, gt=0)
    """Scaling of the update: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of the adapter."""
    target_modules: NonEmpty | Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Names of the linear layers that get an adapter, or `all-linear` for every linear layer except the LM head."""


ConfigValue = str | int | float | bool | None | dict[str, str | int | float | bool | None]


class ModelSection(Section):
    """The base model, its precision and its adapter."""

    base: FilePath
    """Hub id or local folder of the base model; for DPO, the `final/` folder of the SFT run."""
    revision: NonEmpty | None = None
    """Hub commit, branch or tag to pin."""
    trust_remote_code: bool = False
    """Run Python code from the model repository. Leave this false unless you have read the code."""
    random_init: bool = False
    """Start from random weights. `base` then needs only config.json and a tokenizer."""
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    """Attention implementation. auto uses flash (of flash-attn or of torch) if a test on the GPU passes, otherwise
    sdpa. flash is an error where it does not work."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of computation, of the weights in final/, and of the frozen base under an adapter. Trained weights are
    float32 during training."""
    overrides: dict[NonEmpty, ConfigValue] = Field(default={})
    """Keys of the base's config.json with other values, e.g. {rope_theta: 1000000, max_position_embeddings: 32768}. A
    value must have the type of the base's own, and must not change the shape of a weight. final/ has the new values."""
    adapter: LoraSection | None = None
    """Train a low-rank adapter instead of all weights. null trains all weights."""


class ChatSection(Section):
    """The chat template and its special tokens."""

    template: FilePath | None = None
    """Name of a chat template in data_templates/chat/, or path of a file in the same format. null uses the template
    of the base model if it matches one of these, or chatml if the base has no template. A base with any other Jinja
    template is rejected until this key is set."""
    eos_token: NonEmpty | None = None
    """End-of-turn token. null uses the token of the template."""
    pad_token: NonEmpty | None = None
    """Padding token. null uses the token of the template."""
    new_tokens: Literal["auto", "reserved", "resize"] = "auto"
    """How template tokens that the tokenizer lacks are added: reserved renames unused reserved tokens, resize adds rows
    to the embedding matrix, auto uses reserved tokens where there are enough."""
    default_system: str | Annotated[dict[str, str], Field(min_length=1)] | None = None
    """System message for conversations that have none: one text, or one text per language code."""


class ContainerSection(Section):
    """Container of a Slurm job: the nodes start the run in it."""

    image: Line
    """Image: a file (.sif, .sqsh), a folder, or a name in a registry."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis passes the image to srun (--container-image). apptainer runs `apptainer exec`, or `singularity exec` where
    only that is installed, with --nv or --rocm for the GPUs of the node."""
    mounts: Annotated[tuple[Annotated[str, Field(pattern=MOUNT)], ...], Field(strict=False)] = ()
    """Further folders of the nodes, as `/HOST`, `/HOST:/CONTAINER` or `/HOST:/CONTAINER:ro`. The working directory, the
    run directories, data, base models, caches, and the code outside the image are mounted without this key."""
    options: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Further options: of srun under pyxis (e.g. --container-writable), of `apptainer exec` under apptainer."""


class PrepareJobSection(Section):
    """The CPU job of `launch --slurm --prepare`, which prepares the data before the training job starts."""

    cpus: Count = 16
    """CPU cores."""
    partition: SlurmWord | None = None
    """Slurm partition. null uses that of the cluster section."""
    time: SlurmWord | None = None
    """Time limit. null uses that of the cluster section."""
    extra: Annotated[tuple[SlurmOption, ...], Field(strict=False)] = ()
    """Additional sbatch options of this job, e.g. --mem=64G; `cluster.extra` applies to the training job alone."""


def _image_section(value: object) -> object:
    """An image alone, as recipes of earlier versions have it, as the section."""
    return {"image": value} if isinstance(value, str) else value


class ClusterSection(Section):
    """Slurm job settings for `nesso-tune launch --slurm`. Training itself does not read them."""

    nodes: Count = 1
    """Number of nodes."""
    gpus_per_node: Count = 1
    """GPUs per node. One process runs on each GPU."""
    cpus_per_gpu: Count = 8
    """CPU cores per process. Also sets OMP_NUM_THREADS."""
    gpu_option: Literal["gpus-per-node", "gres", "gpus-per-task", "none"] = "gpus-per-node"
    """How the job asks for GPUs: --gpus-per-node=N, --gres=gpu:N, --gpus-per-task=N (there is one task per node), or
    not at all, where whole nodes are allocated."""
    gpu_type: SlurmWord | None = None
    """Type of GPU in that option, e.g. a100: --gres=gpu:a100:N."""
    partition: SlurmWord | None = None
    """Slurm partition."""
    account: SlurmWord | None = None
    """Slurm account."""
    time: SlurmWord | None = None
    """Time limit of a job, e.g. 24:00:00."""
    save_before_s: Annotated[int, Field(ge=1, le=65535)] = SAVE_BEFORE_S
    """Seconds before the time limit at which Slurm signals the run to save a checkpoint and continue in a new job."""
    modules: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Environment modules to load (`module load`)."""
    setup: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    """Lines of bash that the job runs after the modules, e.g. `source /home/me/.venv/bin/activate`."""
    container: Annotated[
        ContainerSection | None, BeforeValidator(_image_section, json_schema_input_type=Line | ContainerSection | None)
    ] = None
    """Container of the run. Text is its image. null starts the run on the nodes themselves."""
    env: dict[VariableName, Value] = {}
    """Environment variables of the job. Do not put secrets here: the values are written to the job script."""
    python: Line = "python"
    """Python interpreter on the nodes, or in the container, with nesso-tune installed."""
    offline: bool = True
    """Compute nodes have no network. The base model and the data must be in the cache before the job starts."""
    prepare: PrepareJobSection = PrepareJobSection()
    """The CPU job of `launch --slurm --prepare`."""
    extra: Annotated[tuple[SlurmOption, ...], Field(strict=False)] = ()
    """Additional sbatch options, e.g. --exclusive."""
    srun_options: Annotated[tuple[SlurmOption, ...], Field(strict=False)] = ()
    """Additional options of srun, e.g. --mpi=none or --cpu-bind=none."""


class CardSection(Section):
    """Facts for the model card that only you know. A card marks what is missing, and is then not pushed to the hub."""

    name: Line | None = None
    """Name of the model. null uses the name of the run directory."""
    license: Annotated[str, Field(pattern=LICENSE)] | None = None
    """Licence as the hub names it, e.g. apache-2.0, mit, cc-by-4.0, llama3.2, other."""
    citation: NonEmpty | None = None
    """How to cite the model, e.g. BibTeX."""
    acknowledgements: NonEmpty | None = None
    """Acknowledgements in Markdown."""
    text: NonEmpty | None = None
    """Introduction in Markdown: what the model is for, and who made it."""


Plain = str | int | float | bool
AUTO = "auto"  # value of a source's `format` or `language`


class Rule(Section):
    """Settings for the rows of one language in a source."""

    keep: bool = True
    """false drops these rows."""
    min_score: float | None = None
    """Drop rows with a `score_field` below this value. Overrides the value of the source."""
    weight: float | None = Field(default=None, gt=0, le=1000)
    """Number of times these rows are used per epoch; at least one row is used. Overrides the value of the source."""


class Source(Section):
    """One source of training or validation rows."""

    path: FilePath
    """File, glob pattern, folder, URL (s3, gs, hf, https), or hub id of a dataset."""
    split: NonEmpty = "train"
    """Split of a hub dataset, or of files whose names carry several splits. all reads every file."""
    subset: NonEmpty | None = None
    """Configuration (subset) of a hub dataset."""
    revision: NonEmpty | None = None
    """Hub commit, branch or tag to pin."""
    alias: PathName | None = None
    """Name of this source in reports and in `data.mixture.shares`. null uses its path."""
    format: FilePath = "auto"
    """Row format: a name in data_templates/formats/, the path of a file of the same kind, `FILE.py:FUNCTION` (your own
    reader, which converts each row to a known format), or auto, which detects the format."""
    reads: Annotated[tuple[FilePath, ...], Field(strict=False)] = ()
    """Files that your own reader opens. They become part of the cache key, so changing one re-encodes the data. Your
    own modules that the reader imports by name are tracked without this key; other inputs are not tracked."""
    where: dict[str, Plain | Annotated[tuple[Plain, ...], Field(strict=False, min_length=1)]] = Field(default={})
    """Keep only rows with these column values, e.g. {source: [a, b]}. Other rows are counted as `not_selected`."""
    messages_field: NonEmpty | None = None
    """Column with the list of messages."""
    role_field: NonEmpty | None = None
    """Key of a message with its role."""
    content_field: NonEmpty | None = None
    """Key of a message with its text."""
    roles: dict[str, Role] | None = None
    """Map from role names in the data to the roles used here, e.g. {utente: user}."""
    system_field: NonEmpty | None = None
    """Column with the system message."""
    tools_field: NonEmpty | None = None
    """Column with the available tools: a list of JSON schemas, or the list as JSON text (default `tools`)."""
    tools_file: FilePath | None = None
    """JSON file with the tools available in rows that list none."""
    prompt_field: NonEmpty | None = None
    """Column with the instruction or prompt."""
    input_field: NonEmpty | None = None
    """Column with additional input for the instruction."""
    response_field: NonEmpty | None = None
    """Column with the response."""
    text_field: NonEmpty | None = None
    """Column with plain text; all of its tokens are supervised (format completion)."""
    chosen_field: NonEmpty | None = None
    """Column with the chosen response."""
    rejected_field: NonEmpty | None = None
    """Column with the rejected response."""
    choice_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Columns with the two responses that are compared (format choice)."""
    label_fields: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)] | None = None
    """Columns with the preferred response: one label, or one vote per annotator."""
    labels: Annotated[tuple[Plain, ...], Field(strict=False, min_length=2, max_length=2)] | None = None
    """Values of `label_fields` that mean the first and the second response, e.g. [1, 2]. Other values are not
    counted."""
    language: NonEmpty | None = None
    """Language code of all rows. null uses the code in each row; auto does too, and detects the language of rows
    without a code."""
    language_field: NonEmpty | None = None
    """Column with the language code of a row. null looks for `lang` and `language`."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Number of times the source is used per epoch: 2.0 uses it twice, 0.5 uses a different half in each epoch. At
    least one row is used."""
    max_rows: Count | None = None
    """Maximum number of rows to read."""
    min_score: float | None = None
    """Drop rows with a `score_field` below this value."""
    score_field: NonEmpty | None = None
    """Column with the quality score of a row."""
    rules: dict[NonEmpty, Rule] = Field(default={})
    """Settings per language code, e.g. {en: {min_score: 0.6}}. `other` applies to all languages not listed."""
    private: bool = False
    """Hide this source. Only recipe.yaml names it; all other outputs of the run show a number, and no row of its files
    is shown, even if another source reads them too. Counts, losses and languages are shown."""


class Decontamination(Section):
    """Drop rows that contain evaluation texts, by n-gram overlap as in Tulu 3 (arXiv:2411.15124, §3.2)."""

    files: Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)]
    """Files with evaluation texts, of any type that a source can have."""
    fields: Annotated[tuple[NonEmpty, ...], Field(strict=False)] = ()
    """Columns with the texts. If empty, uses prompt, question, instruction, input and messages where they exist."""
    ngram: Annotated[int, Field(ge=2, le=100)] = 8
    """Words per n-gram. An evaluation text shorter than this must occur in full."""
    overlap: float = Field(default=0.5, gt=0, le=1)
    """Drop a row if matching n-grams cover at least this fraction of the words of an evaluation text."""


class CleanSection(Section):
    """Cleaning of rows before encoding. data_report.json lists the number of rows that each step changed or dropped."""

    unicode: Literal["nfc"] | None = None
    """Unicode normalisation of all text. nfc composes characters (Unicode NFC); null changes nothing."""
    invisible: Literal["keep", "remove"] = "keep"
    """remove deletes zero-width and control characters. Tabs, line breaks and the joiners of emoji are kept."""
    empty_turns: Literal["keep", "remove", "drop"] = "keep"
    """User and system turns without text: keep them, remove the turn, or drop the row. A row without a response is
    always dropped."""
    role_order: Literal["drop", "merge", "keep"] = "drop"
    """Rows with consecutive turns of one role, a system message after the first turn, or a tool result without a call.
    drop drops the row, merge joins the texts of consecutive turns, keep leaves the row unchanged."""
    duplicates: Literal["keep", "drop"] = "keep"
    """drop keeps only the first of several rows with identical turns and tools."""
    near_duplicates: float | None = Field(default=None, ge=0.3, le=1)
    """Drop a row if its estimated Jaccard similarity to an earlier row is at least this value (MinHash over word
    trigrams). null keeps near duplicates."""
    validation_overlap: Literal["keep", "drop"] = "keep"
    """drop removes training rows that share a prompt with a validation row."""
    decontaminate: Decontamination | None = None
    """Drop rows that contain evaluation texts. null skips this step."""
    personal_data: Literal["report", "mask", "drop"] | None = None
    """Search texts, tool calls and tools for e-mail addresses, IBANs, Italian tax codes (codice fiscale, partita IVA),
    card numbers and phone numbers. report counts them by kind, mask also replaces each with a placeholder such as
    [EMAIL], drop drops the rows. null skips this step."""


class MixtureSection(Section):
    """Token shares of languages or sources in an epoch. A group with more data than its share is resampled every
    epoch."""

    by: Literal["language", "source"]
    """What the shares refer to."""
    shares: Annotated[dict[PathName, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    """Share of tokens per language code, or per source (alias or path). The shares add up to 1; 0 excludes a group.
    `other` applies to all groups not listed."""
    repeat: float = Field(default=1.0, ge=1, le=1000)
    """Maximum number of times a row is used per epoch. Above 1, small groups are repeated instead of reducing the
    others."""


class Limit(Section):
    """Thresholds of one check of preference data."""

    warn: float | None = Field(default=None, ge=0)
    """Print a warning at or above this value. null never warns."""
    fail: float | None = Field(default=None, ge=0)
    """Stop with an error at or above this value. null never stops."""


class PreferenceSection(Section):
    """Checks of preference data, and the thresholds of their warnings and errors."""

    length_predicts: Limit = Limit(warn=0.7)
    """Share of pairs in which length alone predicts the chosen response (always the longer, or always the shorter)."""
    length_ratio: Limit = Limit(warn=1.5)
    """Total tokens of chosen responses divided by those of rejected responses, or the inverse if that is larger."""
    same_answers: Limit = Limit(warn=0.01)
    """Share of rows with identical chosen and rejected responses. These rows are dropped."""
    conflicting: Limit = Limit(warn=0.001)
    """Share of pairs with a chosen response that another pair rejects for the same prompt."""
    language_mismatch: Limit = Limit(warn=0.02)
    """Share of pairs with a response in a different language than the prompt."""
    too_long: Limit = Limit(warn=0.1)
    """Share of rows with a response that does not fit into sequence_len. These rows are dropped."""


class DataSection(Section):
    """Data settings common to SFT and DPO."""

    sequence_len: int = Field(default=4096, ge=8, le=10_000_000)
    """Maximum sequence length in tokens. With packing, the length of a packed row."""
    validation_size: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Number of rows (integer) or fraction of rows held out for evaluation, stratified by language. 0 holds out
    none."""
    validation_sources: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """Sources of validation rows, used instead of a held-out split."""
    sources: Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]
    """Sources of training rows."""
    reasoning: Literal["error", "drop", "keep"] = "error"
    """Reasoning of answers: `reasoning_content`, `reasoning`, `thinking`, or content parts of that type. error stops at
    the first row that has any; drop removes it; keep trains on it, as the chat template writes it."""
    clean: CleanSection = CleanSection()
    """Cleaning of rows before encoding."""
    mixture: MixtureSection | None = None
    """Token shares of languages or sources in an epoch. null uses all rows, with the weight of each source."""


class SFTData(DataSection):
    """Data for supervised fine-tuning."""

    packing: bool = True
    """Pack several conversations into one row, with attention isolated to each conversation. If the model does not
    support this, the run trains on one conversation per row and prints a note."""
    roles_to_train: Annotated[tuple[Role, ...], Field(strict=False, min_length=1)] = ("assistant",)
    """Roles with supervised tokens: the loss is computed on their text."""
    turns_to_train: Literal["all", "last"] = "all"
    """last supervises only the last of these turns in a conversation, and leaves out the turns after it. Chat templates
    that drop the reasoning of earlier answers, such as qwen3, need it for conversations of several user turns."""
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    """Which end-of-turn tokens are supervised: turn, those of every supervised turn; all, those of all turns; last,
    that of the last supervised turn; none."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """Handling of conversations longer than sequence_len. truncate cuts after the last complete turn that fits."""


class DPOData(DataSection):
    """Data for preference training. Responses are never truncated, because a cut response would lose its end token."""

    sequence_len: int = Field(default=1024, ge=8, le=10_000_000)
    """Maximum length of prompt plus response in tokens."""
    too_long: Literal["drop", "error"] = "drop"
    """Handling of pairs in which the prompt plus the longer response exceed sequence_len."""
    preferences: PreferenceSection = PreferenceSection()
    """Checks of the preference pairs."""
