"""Model card of a model folder, from its `provenance.json` and `config.json` alone.

`FIELDS` maps every value of the tables to its file and key. What is not known is a marked placeholder.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.evaluation.records import Evaluations, read_records
from nesso_tune.export.stages import PROVENANCE, Stage, read_stages, to_provenance, with_card, write_stages
from nesso_tune.files import atomic_write
from nesso_tune.logs import visible
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.schema import Recipe
from nesso_tune.runs.layout import FINAL, RECIPE
from nesso_tune.runs.run_directory import check_final_exists, find_run

PLACEHOLDER = "[placeholder: "
CARD = "README.md"
LIBRARIES = {"hf": "transformers", "adapter": "peft", "mlx": "mlx"}


@dataclass(frozen=True)
class CardField:
    """A row of a table of the card.

    Attributes:
        label: first column.
        file: file in the model folder.
        key: dotted key in that file; of a stage, relative to the stage.
        format: of numbers.
    """

    label: str
    file: str
    key: str
    format: str = ""


CONFIG = "config.json"
MODEL_FIELDS = (
    CardField("Architecture", CONFIG, "architectures.0"),
    CardField("Parameters", PROVENANCE, "stages.-1.parameters", ","),
    CardField("Layers", CONFIG, "num_hidden_layers"),
    CardField("Hidden size", CONFIG, "hidden_size"),
    CardField("Feed-forward size", CONFIG, "intermediate_size"),
    CardField("Attention heads", CONFIG, "num_attention_heads"),
    CardField("Key-value heads", CONFIG, "num_key_value_heads"),
    CardField("Vocabulary", CONFIG, "vocab_size", ","),
    CardField("Context length in tokens", CONFIG, "max_position_embeddings", ","),
    CardField("Precision of the weights", CONFIG, "dtype"),
)
STAGE_FIELDS = tuple(
    CardField(label, PROVENANCE, key, format)
    for label, key, format in (
        ("Base", "base", ""),
        ("Commit of the base", "base_revision", ""),
        ("Optimizer steps", "steps", ","),
        ("Epochs", "epochs", ".3g"),
        ("Rows per step", "global_batch", ","),
        ("Sequence length", "sequence_len", ","),
        ("Learning rate", "schedule", ""),
        ("Rows", "rows", ","),
        ("Tokens", "tokens", ","),
        ("Supervised tokens", "supervised_tokens", ","),
        ("Processes", "processes", ""),
        ("Device", "device", ""),
        ("Attention", "attention", ""),
        ("nesso-tune", "nesso_tune", ""),
        ("torch", "versions.torch", ""),
        ("transformers", "versions.transformers", ""),
        ("trl", "versions.trl", ""),
    )
)
FIELDS = (*MODEL_FIELDS, *STAGE_FIELDS)


def model_card(folder: Path, config_folder: Path | None = None) -> str:
    """README.md of a model folder, in Markdown.

    Args:
        folder: has provenance.json.
        config_folder: has config.json; by default `folder`.
    """
    return _render(_read(folder / PROVENANCE), config_folder or folder)


def read_card(folder: Path) -> str | None:
    """The card of a model folder as it is, whether it was generated or edited; None without one."""
    file = folder / CARD
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def renew_card(path: Path, overwrite: bool = False) -> Path:
    """Writes the card of a finished run again, from the card section of its recipe.yaml and the results in `final/`.

    `provenance.json` gets the new section too, so that it travels with the model.

    Args:
        path: the run directory, or its `final/`.
        overwrite: replace a card that somebody edited.

    Returns:
        The card.

    Raises:
        RunEnvironmentError: if the folder is not a finished run, or its card was edited.
        RecipeError: if its recipe.yaml is not valid.
    """
    if path.name != FINAL and (path / PROVENANCE).is_file():
        remedy = "name the run that it was made from, or export that run again"
        raise RunEnvironmentError(str(path), "is a model folder, not a run", remedy)
    run = find_run(path)
    final = run / FINAL
    stages = _stages_of_run(run)
    stages = with_card(stages, load_recipe(run / RECIPE))
    text = _render(to_provenance(stages), final)
    if not overwrite and read_card(final) not in (None, text, model_card(final)):
        what = "was edited, or files in evaluations/ were added or removed by hand"
        raise RunEnvironmentError(str(final / CARD), what, "--overwrite replaces it; an edited text is then lost")
    atomic_write(final / CARD, text)  # before the provenance: interrupted in between, it is not taken for an edited one
    write_stages(final, stages)
    return final / CARD


def _stages_of_run(run: Path) -> list[Stage]:
    """The stages in `final/` of a run. Raises RunEnvironmentError if there are none."""
    check_final_exists(run)
    if not (stages := read_stages(run / FINAL)):
        what = f"has no readable {PROVENANCE}, from which cards are made"
        raise RunEnvironmentError(str(run / FINAL), what, f"edit {CARD} by hand, or train again with --overwrite")
    return stages


def _render(provenance: Mapping[str, Any], model: Path) -> str:
    """The card of a model with this provenance; its config.json and results are in the folder `model`."""
    files = {PROVENANCE: provenance, CONFIG: _read(model / CONFIG)}
    stages, export = files[PROVENANCE]["stages"], files[PROVENANCE]["export"]
    last, first, own = stages[-1], stages[0], stages[-1]["card"]
    kind = export.get("to", "hf")
    again = "export it again" if export else "run `nesso-tune card RUN`"
    every = [*stages, *export.get("others", [])]  # with the stages of other models in an average
    languages = {code: None for stage in every for code in stage["languages"] if code != "und"}
    hub_data = {source["name"]: None for stage in every for source in stage["sources"] if source["hub"]}
    return _environment.get_template("card.md.j2").render(
        kind=kind,
        library=LIBRARIES.get(kind),
        name=own["name"] or last["name"],
        own=own,
        license=own["license"],
        base_model=first["base"] if first["base_on_hub"] and not first["random_init"] else None,
        languages=list(languages),
        datasets=list(hub_data),
        method=last["method"],
        chain=[_origin(first), *(f"{stage['method'].upper()} ({stage['name']})" for stage in stages)],
        model_table=_table(MODEL_FIELDS[:-1] if export else MODEL_FIELDS, files),  # an export has its own precision
        stages=[
            {
                **stage,
                "table": [*_table(STAGE_FIELDS, {PROVENANCE: stage}), *_hyperparameters(stage)],
                "is_other": stage not in stages,
            }
            for stage in every
        ],
        evaluations=Evaluations() if export.get("average") else read_records(model),
        context=files[CONFIG].get("max_position_embeddings"),
        export=export,
        placeholder=lambda what, key: f"{PLACEHOLDER}{what}; set {key} in recipe.yaml of the run and {again}]",
    )


def placeholders(card: str) -> list[tuple[str, str]]:
    """What the placeholders in the text of a card stand for, each with what to do."""
    found = [part.splitlines()[0].partition("]")[0].partition("; ") for part in card.split(PLACEHOLDER)[1:]]
    return [(what, remedy or "complete the card section of recipe.yaml") for what, _, remedy in found]


def placeholders_of_exports(run: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """The placeholders that the card of an export of a finished run would have; see `placeholders`.

    Args:
        run: the run directory.
        recipe: its recipe; exports get its card section instead of the one that the run trained with.
    """
    stages = read_stages(run / FINAL)
    if not stages:  # of a model from before provenance files: exports get its card as it is
        return placeholders(read_card(run / FINAL) or "")
    how: dict[str, Any] = {"to": "hf", "dtype": "", "checked": None, "average": []}
    return placeholders(_render(to_provenance(with_card(stages, recipe), how), run / FINAL))


def _origin(stage: Mapping[str, Any]) -> str:
    return f"random weights of the shape {stage['base']}" if stage["random_init"] else str(stage["base"])


def _table(fields: tuple[CardField, ...], files: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(field.label, find(files[field.file], field.key), field.format) for field in fields]
    return [(label, _shown(value, format)) for label, value, format in rows if value not in (None, "")]


def _hyperparameters(stage: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{key}`", _shown(value, "")) for key, value in stage["hyperparameters"].items()]


def find(data: Any, key: str) -> Any:
    """The value under a dotted key; items of lists by index. None if there is none."""
    for part in key.split("."):
        try:
            data = data[int(part)] if isinstance(data, list) else data.get(part)
        except (IndexError, AttributeError):
            return None
    return data


def _shown(value: Any, format: str) -> str:
    return f"{value:{format}}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _finalize(value: Any) -> Any:
    """Escapes control characters, line breaks too, in every printed value; `Markdown` is the author's own text."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markdown) else value


class Markdown(str):
    """Text of the recipe's `card` section, which may have several lines."""


def _markdown(text: str) -> Markdown:
    return Markdown("\n".join(visible(line) for line in text.splitlines()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _yaml(text: str) -> str:
    """A plain word of the front matter, in quotes where YAML would read it as a number, a truth value or null."""
    return (
        text if re.fullmatch(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z][\w.-]*", text) else json.dumps(text)
    )


_environment = Environment(
    loader=PackageLoader("nesso_tune.export"),
    autoescape=False,  # Markdown
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_environment.filters |= {"markdown": _markdown, "cell": _cell, "yaml": _yaml, "shell": shlex.quote}
