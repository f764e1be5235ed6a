"""Real rows of a recipe as the model will see them: prepared, packed and collated as in training, before any weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nesso_tune.chat.encoding import IGNORED
from nesso_tune.chat.files import base_folder, check_at_hand
from nesso_tune.data.prepare import PreparedData, prepare_data
from nesso_tune.errors import RunEnvironmentError
from nesso_tune.publish.view import Part, ViewRow, pieces_of
from nesso_tune.publish.view_html import page
from nesso_tune.publish.view_text import lines
from nesso_tune.recipes.describe import row_name
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.shipped import BUNDLED_TOKENS, bundled_base, is_result, local_path
from nesso_tune.training.collate import ConversationCollator, PairCollator
from nesso_tune.training.tally import Groups


@dataclass(frozen=True)
class Preview:
    """Rows to look at.

    Attributes:
        title: what they belong to.
        rows: the first rows of epoch 0.
        facts: about all rows, as `name: value`.
        notes: what a reader must know, e.g. that another tokenizer stands in.
    """

    title: str
    rows: tuple[ViewRow, ...]
    facts: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_html(self) -> str:
        """One page that opens offline."""
        return page(self.title, self.rows, self.facts, self.notes)

    def to_text(self, width: int = 80, colour: bool = False) -> str:
        """Lines of at most `width` cells; without colours, what is learned stands between ⟦ and ⟧."""
        return "\n".join(lines(self.rows, self.facts, self.notes, width, colour))

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return self.to_html()


def preview(recipe: Recipe, count: int = 2) -> Preview:
    """The first `count` rows of a recipe (packed rows in SFT, pairs in DPO), as they are trained in epoch 0.

    Raises:
        NessoError: as `prepare_data`.
    """
    recipe, notes = _with_tokenizer(recipe)
    data = prepare_data(recipe)
    shown = range(min(count, len(data.train)))
    row_of = _packed if recipe.method == "sft" else _pair
    report = data.report
    facts = {
        "rows": f"{len(shown)} of {len(data.train):,} {row_name(recipe)} an epoch",
        "tokens": f"{report['train']['tokens']:,} an epoch, {report['train']['supervised_tokens']:,} of them learned",
        "fill": f"{report['packing']['fill']:.1%} of each row" if recipe.method == "sft" else "one pair a row",
        "dropped": ", ".join(f"{n:,} {reason}" for reason, n in report["dropped"].items()) or "none",
        "template": f"ends turns with {data.chat.template.eos_token}",
    }
    return Preview(recipe.output_dir, tuple(row_of(recipe, data, i) for i in shown), facts, notes)


def _with_tokenizer(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe, with the bundled tokenizer where its own is not at hand: the same masks over other tokens."""
    base = recipe.model.base
    check_at_hand(recipe.model.model_copy(update={"random_init": True}))  # weights are not needed yet
    if local_path(base).exists():
        return recipe, ()
    with suppress(RunEnvironmentError):
        if not is_result(base):
            base_folder(base, recipe.model.revision)
            return recipe, ()
    model = recipe.model.model_copy(update={"base": bundled_base(), "revision": None})
    note = (
        f"the tokenizer of {base} is not at hand: a small bundled one stands in. What is learned is the same; tokens, "
        "their number and the packing are not, and rows may be twice as long"
    )
    length = BUNDLED_TOKENS * recipe.data.sequence_len
    data = recipe.data.model_copy(update={"sequence_len": length, "too_long": "drop"})
    chat = recipe.chat.model_copy(update={"pad_token": None})
    return recipe.model_copy(update={"model": model, "data": data, "chat": chat}), (note,)


def _packed(recipe: Recipe, data: PreparedData, number: int) -> ViewRow:
    """A packed row, with the labels that the collator gives to the trainer."""
    row, documents = data.train[number], data.train.documents
    batch = ConversationCollator(data.chat.pad_id, Groups.of(documents))([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    parts, start = [], 0
    for entry, language, length in zip(data.train.members(number), row["languages"], row["seq_lengths"], strict=True):
        end = start + length
        source = recipe.data.sources[int(documents.sources[entry])].path
        learned = [label != IGNORED for label in labels[start:end]]
        parts.append(Part("conversation", language, source, pieces_of(ids[start:end], learned, data.chat.backend)))
        start = end
    return ViewRow(number, tuple(parts))


def _pair(recipe: Recipe, data: PreparedData, number: int) -> ViewRow:
    """A pair as prompt, chosen and rejected answer, with the mask that the collator gives to the trainer."""
    row, documents = data.train[number], data.train.documents
    (entry,) = data.train.members(number)
    batch = PairCollator(data.chat.pad_id, Groups.of(documents))([row])
    source = recipe.data.sources[int(documents.sources[entry])].path
    parts = [
        Part(name, row["languages"][0], source, pieces_of(ids, learned, data.chat.backend))
        for name, ids, learned in _sides(batch)
    ]
    return ViewRow(number, tuple(parts))


def _sides(batch: dict[str, Any]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Prompt, chosen and rejected answer of a collated pair, each with what is learned of it."""
    sides = zip(
        ("chosen", "rejected"), batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    )
    for name, ids, real, completion in sides:
        answer = [bool(c) for c, r in zip(completion.tolist(), real.tolist(), strict=True) if r]
        tokens = [token for token, r in zip(ids.tolist(), real.tolist(), strict=True) if r]
        start = answer.index(True)
        if name == "chosen":
            yield "prompt", tokens[:start], answer[:start]
        yield name, tokens[start:], answer[start:]
