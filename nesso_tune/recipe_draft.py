"""A first recipe, made from a base and data files: values by the size of both, every choice with its reason."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.chat.special_tokens import CHAT_KEY
from nesso_tune.data.detect import NEARLY_ALL, DetectedSource
from nesso_tune.data.estimate import CHARACTERS
from nesso_tune.errors import ModelError
from nesso_tune.logs import visible
from nesso_tune.planning.advice import auto_learning_rate, tuned_near
from nesso_tune.planning.shapes import ModelShape
from nesso_tune.recipes.json_schema import FILE
from nesso_tune.recipes.schema import DEFAULT_EPOCHS
from nesso_tune.recipes.sections import AUTO

STEPS, FEW_STEPS, MOST_EPOCHS = 150, 60, 10  # steps a run should have, and passes over little data
LARGEST_BATCH = {"sft": 256, "dpo": 128}
SMALLEST_BATCH = 8
LONGEST = 4096  # tokens of a row, unless much of the data is longer
SMALL = 2e9  # parameters


@dataclass(frozen=True)
class Choices:
    """The values of a first recipe that depend on base and data."""

    sequence_len: int
    validation_size: int | float
    num_epochs: float
    micro_batch_size: int
    global_batch_size: int
    learning_rate: float


def choose(method: str, data: Sequence[DetectedSource], shape: ModelShape | None) -> Choices:
    """Values by the size of base and data.

    Rows are as long as 99 % of the data need, in powers of two; the global batch is the tuned one, or smaller, so that
    the run has enough steps; the learning rate is that of models of this size.
    """
    lengths = sorted(_tokens(data))
    most = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    rows = sum(part.rows or len(part.characters) for part in data)
    context = (shape.context if shape and shape.context else LONGEST) or LONGEST
    needed = 2 ** math.ceil(math.log2(max(most, 256)))
    length = min(context, max(needed, LONGEST) if method == "sft" else needed)
    epochs = DEFAULT_EPOCHS[method]
    tokens = rows * sum(lengths) / len(lengths)
    if method == "sft":  # packed rows; short ones where there is little data
        while length > max(512, needed) and tokens * epochs / length < STEPS * SMALLEST_BATCH:
            length //= 2
    units = tokens / length if method == "sft" else rows
    batch = 2 ** int(math.log2(max(1.0, units * epochs / STEPS)))
    batch = min(LARGEST_BATCH[method], max(SMALLEST_BATCH, batch))
    if method == "sft" and units * epochs / batch < FEW_STEPS:  # little data is seen more often
        epochs = float(min(MOST_EPOCHS, math.ceil(FEW_STEPS * batch / units)))
    size = shape.parameters if shape else SMALL
    micro = 1 if size > 4e9 else 2 if size > 1e9 else 4
    return Choices(
        sequence_len=length,
        validation_size=0.1 if rows < 500 else int(float(f"{min(2000, max(50, 0.05 * rows)):.1g}")),
        num_epochs=epochs,
        micro_batch_size=min(micro, max(1, batch // 8)),
        global_batch_size=batch,
        learning_rate=auto_learning_rate(method, shape),
    )


@dataclass(frozen=True)
class Base:
    """The base that a first recipe starts from.

    Attributes:
        name: hub id or folder.
        shape: None where it is not known.
        template: name of a chat template for it; None where it brings its own.
        replaces: how that template differs from the base's own, which it replaces; empty where it replaces none.
        random_init: whether it is a folder without weights.
    """

    name: str
    shape: ModelShape | None
    template: str | None
    random_init: bool = False
    replaces: str = ""


def draft(name: str, file: str, base: Base, method: str, data: Sequence[DetectedSource]) -> str:
    """The text of a recipe.

    Args:
        name: of the run.
        file: of the recipe, for its own command.
        base: where it starts from.
        method: `sft` or `dpo`.
        data: what was found in its sources, all of this method.
    """
    values = choose(method, data, base.shape)
    lines = [
        *_head(name, file, base, method),
        *_model(base),
        *_data(values, method, data),
        *_train(values, method, base.shape),
        *(_dpo(base.shape) if method == "dpo" else []),
        _noted("checkpoint: {every_steps: 0.25, keep: 2}", "a quarter of the run"),
        _noted("evaluation: {every_steps: 0.1, samples: 16}", "loss by language, and 16 answers to held-out prompts"),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, file: str, base: Base, method: str) -> list[str]:
    kind = "supervised fine-tuning" if method == "sft" else "preference training"
    title, command = f"{name}: {kind} of {base.name}.", visible(shlex.quote(file))
    return [
        f"# yaml-language-server: $schema={FILE}",
        f"# {''.join(c if c.isprintable() else ' ' for c in title)}",
        "#",
        f"#   nesso-tune check {command}",
        f"#   nesso-tune train {command}",
        "#",
        "# Every key: `nesso-tune schema`, or your editor, which reads the schema named above.",
        f"method: {method}",
        f"output_dir: {_text(f'outputs/{name}')}",
    ]


def _model(base: Base) -> list[str]:
    lines = ["model:", _noted(f"  base: {_text(base.name)}", _size(base.shape))]
    if base.random_init:
        lines.append(_noted("  random_init: true", "the folder has no weights"))
    if base.template is not None:  # otherwise tokens and template come with the base
        note = "replaces the base's own" if base.replaces else "or a file of your own"
        lines += ["chat:", _noted(f"  template: {base.template}", note)]
    return lines


def _data(values: Choices, method: str, data: Sequence[DetectedSource]) -> list[str]:
    rows = "conversations are packed into rows of this length" if method == "sft" else "prompt and longer answer"
    return [
        "data:",
        _noted(f"  sequence_len: {values.sequence_len}", rows),
        _noted(f"  validation_size: {values.validation_size}", "rows held out for evaluation, in every language alike"),
        "  sources:",
        *(line for part in data for line in _source(part)),
    ]


def _train(values: Choices, method: str, shape: ModelShape | None) -> list[str]:
    tail = ", constant_ratio: 0.8, min_ratio: 0.3" if method == "sft" else ""
    return [
        "train:",
        _noted(f"  num_epochs: {values.num_epochs:g}", "passes over the data"),
        _noted(f"  micro_batch_size: {values.micro_batch_size}", "rows at a time on each GPU; see check --gpu NAME"),
        _noted(f"  global_batch_size: {values.global_batch_size}", "rows a step over all GPUs"),
        _noted(f"  learning_rate: {_number(values.learning_rate)}", _rate_note(method, shape)),
        f"  schedule: {{type: cosine, warmup_ratio: {0.03 if method == 'sft' else 0.1}{tail}}}",
    ]


def _dpo(shape: ModelShape | None) -> list[str]:
    beta = 0.5 if shape is None or shape.parameters < SMALL else 0.1
    return [
        "dpo:",
        _noted(f"  beta: {beta}", "how strongly the model is held to where it starts from"),
        _noted("  loss: {sigmoid: 1.0, sft: 0.2}", "the sft term keeps the chosen answers likely"),
    ]


def brings_template(tokenizer_config: Path) -> bool:
    """Whether a base was trained by nesso-tune and brings template and tokens along.

    Raises:
        ModelError: if its tokenizer_config.json cannot be read.
    """
    try:
        return CHAT_KEY in dict(json.loads(tokenizer_config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ModelError(str(tokenizer_config), "cannot be read", "fetch the model again") from None


def _noted(line: str, note: str) -> str:
    return f"{line:<34}  # {note}" if note else line


def _size(shape: ModelShape | None) -> str:
    if shape is None:
        return "its size is not known here"
    return f"{shape.parameters / 1e6:,.0f} M parameters, context {shape.context:,}"


def _rate_note(method: str, shape: ModelShape | None) -> str:
    if shape is None:
        return "a careful one, since the size of the base is not known here"
    run = tuned_near(method, shape)
    return f"for this size; tuned nearby: {run.learning_rate:g} ({run.source})"


def _source(part: DetectedSource) -> list[str]:
    rows = f"{part.rows:,} rows" if part.rows is not None else "rows on the hub"
    tools = f", {part.tools:.0%} with tools" if part.tools else ""
    lines = [
        _noted(f"    - path: {_text(part.path)}", rows + tools),
        f"      format: {part.format}",
        *(f"      {key}: {_value(value)}" for key, value in part.fields.items()),
    ]
    if part.language is None:
        return [*lines, f"      # language: each row says its own, {languages_of(part)}"]
    shares = f": {languages_of(part)}" if part.language == AUTO else ""
    return [*lines, _noted(f"      language: {part.language}", f"told by their words{shares}")]


def languages_of(part: DetectedSource) -> str:
    """The languages of a source and their shares, e.g. `it ~60%, en ~40%`."""
    shown = [(code, share) for code, share in part.languages.items() if share >= 0.01]
    return ", ".join(f"{code} ~{share:.0%}" for code, share in shown) if len(shown) > 1 else shown[0][0]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {_text(item)}" for key, item in value.items()) + "}"
    return _text(str(value))


def _text(text: str) -> str:
    """A text as YAML, quoted where it must be."""
    plain = text.replace("_", "").replace("-", "").replace(".", "").replace("/", "")
    if plain.isalnum() and text.isprintable() and text[0].isalpha() and text.lower() not in ("null", "true", "false"):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())  # JSON texts are YAML


def _number(value: float) -> str:
    """A number as YAML, e.g. `1.0e-3`."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _tokens(data: Sequence[DetectedSource]) -> list[float]:
    """About how many tokens each row has, control tokens with it."""
    return [n / CHARACTERS + 20 for part in data for n in part.characters]


def share_too_long(method: str, data: Sequence[DetectedSource], shape: ModelShape | None) -> float:
    """About which share of the rows is longer than the length that is chosen for them."""
    length = choose(method, data, shape).sequence_len
    sizes = _tokens(data)
    return sum(size > length for size in sizes) / len(sizes)


def usable_note(part: DetectedSource) -> str | None:
    """A sentence if many rows cannot be used."""
    if part.usable >= NEARLY_ALL:
        return None
    why = ", ".join(f"{reason} {n}" for reason, n in part.dropped.items())
    return f"{part.path}: {1 - part.usable:.0%} of the rows cannot be used ({why})"
