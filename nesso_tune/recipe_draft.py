"""Writes a first recipe for a base model and data files: values by the size of both, each with a comment."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nesso_tune.chat.special_tokens import CHAT_KEY
from nesso_tune.data.detect import NEARLY_ALL, DetectedSource
from nesso_tune.data.estimate import CHARACTERS_PER_TOKEN
from nesso_tune.errors import ModelError
from nesso_tune.logs import visible
from nesso_tune.planning.advice import TUNED, auto_learning_rate, nearest_tuned_run
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.json_schema import SCHEMA_FILE
from nesso_tune.recipes.schema import DEFAULT_EPOCHS
from nesso_tune.recipes.sections import AUTO

TARGET_STEPS, MIN_STEPS, MAX_EPOCHS = 150, 60, 10  # MAX_EPOCHS: for small data sets
MAX_BATCH = {"sft": 256, "dpo": 128}
MIN_BATCH = 8
DEFAULT_SEQUENCE_LEN = 4096  # unless much of the data is longer
SMALL_MODEL = 2e9  # parameters


@dataclass(frozen=True)
class DraftSource:
    """A source of a first recipe.

    Attributes:
        detected: its properties.
        split: the split that it reads.
    """

    detected: DetectedSource
    split: str = "train"


@dataclass(frozen=True)
class RecipeValues:
    """The values of a first recipe that depend on base model and data."""

    sequence_len: int
    validation_size: int | float
    num_epochs: float
    global_batch_size: int
    learning_rate: float


def choose_values(method: str, data: Sequence[DetectedSource], shape: ModelShape | None) -> RecipeValues:
    """Chooses values by the size of base model and data.

    The sequence length is a power of two that fits 99 % of the data. The global batch size is at most the tuned one,
    and smaller if the run would have too few steps. The learning rate is the tuned one for the model size, rescaled
    to the tokens or pairs in a batch.
    """
    lengths = sorted(_tokens(data))
    longest = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    rows = sum(part.rows or len(part.characters) for part in data)
    context = (shape.context if shape and shape.context else DEFAULT_SEQUENCE_LEN) or DEFAULT_SEQUENCE_LEN
    needed = 2 ** math.ceil(math.log2(max(longest, 256)))
    length = min(context, max(needed, DEFAULT_SEQUENCE_LEN) if method == "sft" else needed)
    epochs = DEFAULT_EPOCHS[method]
    tokens = rows * sum(lengths) / len(lengths)
    if method == "sft":  # packed rows, shorter for small data sets
        while length > max(512, needed) and tokens * epochs / length < TARGET_STEPS * MIN_BATCH:
            length //= 2
    units = tokens / length if method == "sft" else rows
    batch = 2 ** int(math.log2(max(1.0, units * epochs / TARGET_STEPS)))
    batch = min(MAX_BATCH[method], max(MIN_BATCH, batch))
    if method == "sft" and units * epochs / batch < MIN_STEPS:  # more epochs for small data sets
        epochs = float(min(MAX_EPOCHS, math.ceil(MIN_STEPS * batch / units)))
    return RecipeValues(
        sequence_len=length,
        validation_size=0.1 if rows < 500 else int(float(f"{min(2000, max(50, 0.05 * rows)):.1g}")),
        num_epochs=epochs,
        global_batch_size=batch,
        learning_rate=_learning_rate(method, shape, batch * _batch_unit(method, length)),
    )


def _batch_unit(method: str, length: int) -> int:
    """What a row adds to a batch: the tokens of a packed row, or one pair."""
    return length if method == "sft" else 1


def _learning_rate(method: str, shape: ModelShape | None, batch: int) -> float:
    """The tuned learning rate for a model size, rescaled if the batch is 4x larger or smaller than the tuned one.

    It scales with the square root of the batch size (Malladi et al., 2022, arXiv:2205.10287).

    Args:
        method: `sft` or `dpo`.
        shape: sizes of the model; None if unknown.
        batch: tokens (SFT) or pairs (DPO) per optimizer step.
    """
    rate = auto_learning_rate(method, shape)
    if shape is None:
        return rate
    ratio = batch / _tuned_batch(method, shape)
    return rate if 1 / 4 < ratio < 4 else float(f"{rate * math.sqrt(ratio):.1e}")


def _tuned_batch(method: str, shape: ModelShape) -> float:
    """Tokens or pairs per step of the tuned runs, interpolated to a model size like their learning rates."""
    sizes = [math.log(run.parameters) for run in TUNED[method]]
    batches = [math.log(run.batch) for run in TUNED[method]]
    return math.exp(float(np.interp(math.log(shape.parameters), sizes, batches)))


@dataclass(frozen=True)
class BaseModelInfo:
    """The base model of a first recipe.

    Attributes:
        name: hub id or folder.
        shape: sizes of the model; None if unknown.
        template: name of the chat template to set; None if the base contains one of nesso-tune.
        random_init: whether it is a folder without weights.
        replaces: how the template differs from the base's own one, if it replaces one; else empty.
    """

    name: str
    shape: ModelShape | None
    template: str | None
    random_init: bool = False
    replaces: str = ""


def recipe_text(
    name: str, file: str, base: BaseModelInfo, method: str, sources: Sequence[DraftSource],
    validation: Sequence[DraftSource] = (), on_cpu: bool = False,
) -> str:  # fmt: skip
    """The text of a recipe.

    Args:
        name: name of the run.
        file: path of the recipe, shown in its commands.
        base: the base model.
        method: `sft` or `dpo`.
        sources: inspected sources, all for this method.
        validation: validation sources; without them, rows are held out.
        on_cpu: whether this machine has no GPU.
    """
    data = [source.detected for source in sources]
    values = choose_values(method, data, base.shape)
    lines = [
        *_head(name, file, base, method),
        *_model(base, on_cpu),
        *_data(values, method, sources, validation),
        *_train(values, method, base.shape),
        *(_dpo(base.shape) if method == "dpo" else []),
        _commented("checkpoint: {every_steps: 0.25, keep: 2}", "every quarter of the run"),
        _commented(
            "evaluation: {every_steps: 0.1, samples: 16}", "loss per language, and 16 answers to validation prompts"
        ),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, file: str, base: BaseModelInfo, method: str) -> list[str]:
    kind = "supervised fine-tuning" if method == "sft" else "preference training"
    title, command = f"{name}: {kind} of {base.name}.", visible(shlex.quote(file))
    return [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {''.join(c if c.isprintable() else ' ' for c in title)}",
        "#",
        f"#   nesso-tune check {command}",
        f"#   nesso-tune train {command}",
        "#",
        "# All keys: `nesso-tune schema`, or an editor that reads the schema above.",
        f"method: {method}",
        f"output_dir: {_text(f'outputs/{name}')}",
    ]


def _model(base: BaseModelInfo, on_cpu: bool) -> list[str]:
    lines = ["model:", _commented(f"  base: {_text(base.name)}", _size(base.shape))]
    if base.random_init:
        lines.append(_commented("  random_init: true", "the folder has no weights"))
    if on_cpu:
        lines.append(_commented("  dtype: float32", "this machine has no GPU; remove it to train on one"))
    if base.template is not None:  # otherwise the base contains tokens and template
        note = "replaces that of the base" if base.replaces else "or the path of a file"
        lines += ["chat:", _commented(f"  template: {base.template}", note)]
    return lines


def _data(
    values: RecipeValues, method: str, sources: Sequence[DraftSource], validation: Sequence[DraftSource]
) -> list[str]:
    rows = "length of packed rows" if method == "sft" else "maximum length of prompt and longer answer"
    held_out = "rows held out for evaluation, from all languages"
    has_reasoning = any(source.detected.reasoning for source in (*sources, *validation))
    merges = any(source.detected.merge_turns for source in (*sources, *validation))
    reasoning = "answers have reasoning; keep trains on it, with a template such as qwen3"
    return [
        "data:",
        _commented(f"  sequence_len: {values.sequence_len}", rows),
        *([_commented("  reasoning: drop", reasoning)] if has_reasoning else []),
        *([_commented("  clean: {role_order: merge}", "rows have two turns of one role in a row")] if merges else []),
        *([] if validation else [_commented(f"  validation_size: {values.validation_size}", held_out)]),
        "  sources:",
        *(line for source in sources for line in _source(source)),
        *(["  validation_sources:"] if validation else []),
        *(line for source in validation for line in _source(source)),
    ]


def _train(values: RecipeValues, method: str, shape: ModelShape | None) -> list[str]:
    tail = ", constant_ratio: 0.8, min_ratio: 0.3" if method == "sft" else ""
    return [
        "train:",
        _commented(f"  num_epochs: {values.num_epochs:g}", "passes over the data"),
        _commented("  micro_batch_size: auto", "rows per GPU and forward pass: what fits; see check --gpu NAME"),
        _commented(f"  global_batch_size: {values.global_batch_size}", "rows per step over all GPUs"),
        _commented(f"  learning_rate: {_number(values.learning_rate)}", _rate_note(values, method, shape)),
        f"  schedule: {{type: cosine, warmup_ratio: {0.03 if method == 'sft' else 0.1}{tail}}}",
    ]


def _dpo(shape: ModelShape | None) -> list[str]:
    beta = 0.5 if shape is None or shape.parameters < SMALL_MODEL else 0.1
    return [
        "dpo:",
        _commented(f"  beta: {beta}", "strength of the KL penalty to the reference model"),
        _commented("  loss: {sigmoid: 1.0, sft: 0.2}", "the sft term keeps chosen answers likely"),
    ]


def has_nesso_template(tokenizer_config: Path) -> bool:
    """Whether a base was trained by nesso-tune and contains its template and tokens.

    Raises:
        ModelError: if its tokenizer_config.json cannot be read.
    """
    try:
        return CHAT_KEY in dict(json.loads(tokenizer_config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ModelError(str(tokenizer_config), "cannot be read", "download the model again") from None


def _commented(line: str, note: str) -> str:
    return f"{line:<34}  # {note}" if note else line


def _size(shape: ModelShape | None) -> str:
    if shape is None:
        return "size unknown"
    return f"{shape.parameters / 1e6:,.0f} M parameters, context {shape.context:,}"


def _rate_note(values: RecipeValues, method: str, shape: ModelShape | None) -> str:
    if shape is None:
        return "a conservative value, since the size of the base is unknown"
    run, unit = nearest_tuned_run(method, shape), "tokens" if method == "sft" else "pairs"
    batch = values.global_batch_size * _batch_unit(method, values.sequence_len)
    return f"for {batch:,} {unit} per step; tuned: {run.learning_rate:g} at {run.batch:,} ({run.source})"


def _source(source: DraftSource) -> list[str]:
    part = source.detected
    rows = f"{part.rows:,} rows" if part.rows is not None else "rows on the hub"
    tools = f", {part.tools:.0%} with tools" if part.tools else ""
    lines = [
        _commented(f"    - path: {_text(part.path)}", rows + tools),
        *([] if source.split == "train" else [f"      split: {_text(source.split)}"]),
        f"      format: {_text(part.format)}",
        *(f"      {key}: {_value(value)}" for key, value in part.fields.items()),
    ]
    if part.language is None:
        return [*lines, f"      # language: from each row, {languages_of(part)}"]
    shares = f": {languages_of(part)}" if part.language == AUTO else ""
    return [*lines, _commented(f"      language: {part.language}", f"detected per row{shares}")]


def languages_of(part: DetectedSource) -> str:
    """The languages of a source and their shares, e.g. `it ~60%, en ~40%`."""
    shown = [(code, share) for code, share in part.languages.items() if share >= 0.01]
    return ", ".join(f"{code} ~{share:.0%}" for code, share in shown) if len(shown) > 1 else shown[0][0]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value) if isinstance(value, (bool, int, float)) else _text(str(value))


def _text(text: str) -> str:
    """A text as a YAML scalar, quoted if necessary."""
    plain = text.replace("_", "").replace("-", "").replace(".", "").replace("/", "")
    if plain.isalnum() and text.isprintable() and text[0].isalpha() and text.lower() not in ("null", "true", "false"):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())  # JSON strings are valid YAML


def _number(value: float) -> str:
    """A number as YAML, e.g. `1.0e-3`."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _tokens(data: Sequence[DetectedSource]) -> list[float]:
    """Estimated tokens of each row, including control tokens."""
    return [n / CHARACTERS_PER_TOKEN + 20 for part in data for n in part.characters]


def too_long_share(method: str, data: Sequence[DetectedSource], shape: ModelShape | None) -> float:
    """Estimated share of the rows that exceed the chosen sequence length."""
    length = choose_values(method, data, shape).sequence_len
    sizes = _tokens(data)
    return sum(size > length for size in sizes) / len(sizes)


def unusable_note(part: DetectedSource) -> str | None:
    """A note if many rows are unusable; else None."""
    if part.usable >= NEARLY_ALL:
        return None
    reasons = ", ".join(f"{reason} {n}" for reason, n in part.dropped.items())
    return f"{part.path}: {1 - part.usable:.0%} of the rows cannot be used ({reasons})"
