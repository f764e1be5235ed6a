"""How much data a recipe has, without preparing it: exact from the cache, else estimated from a sample."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.data.build import build_documents
from nesso_tune.data.files import expand, is_local
from nesso_tune.data.prepare import cached_only, prepare_data
from nesso_tune.data.sources import source_rows
from nesso_tune.errors import ModelError, RunEnvironmentError
from nesso_tune.recipes.plan import DataVolume
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import SFTData, Source
from nesso_tune.recipes.shipped import local_path

SAMPLE = 500  # rows of each source
FULL_ROWS = 0.99  # how full best-fit packing leaves a row of chat data


def find_volume(recipe: Recipe) -> DataVolume | None:
    """What one epoch holds, or None where base or data are not at hand (hub ids that were never fetched).

    Raises:
        DataError: if a local file is missing or wrong.
    """
    if not local_path(recipe.model.base).is_dir():
        return None
    sources = [*recipe.data.sources, *recipe.data.validation_sources]
    if not all(is_local(source.path) for source in sources):
        return None
    for source in sources:
        expand(source.path)
    try:
        chat = chat_tokenizer(recipe.model, recipe.chat)
    except (ModelError, RunEnvironmentError):
        return None
    if cached_only(recipe):
        return prepare_data(recipe).volume
    train = [_estimate(recipe, source, chat) for source in recipe.data.sources]
    held = [_estimate(recipe, source, chat) for source in recipe.data.validation_sources]
    return _together(recipe, train, held)


def _estimate(recipe: Recipe, source: Source, chat: ChatTokenizer) -> DataVolume:
    """Usable rows and tokens of a source, from its first rows and the bytes they take of its files."""
    sampled = source.model_copy(update={"max_rows": min(SAMPLE, source.max_rows or SAMPLE)})
    with TemporaryDirectory() as folder:
        report = build_documents(Path(folder), recipe, [sampled], chat)["report"]
    total = max(_row_count(source), report["rows_read"])  # a last line may lack its line break
    ratio = source.weight * total / max(1, report["rows_read"])
    counts = (round(ratio * report[name]) for name in ("rows_kept", "tokens", "supervised_tokens"))
    rows, tokens, supervised = counts
    return DataVolume(rows, tokens, supervised, exact=False)


def _row_count(source: Source) -> int:
    """Rows of a source: lines of JSON-lines files, else the rows counted one by one."""
    files = expand(source.path)
    if all(file.suffix.lower() in (".jsonl", ".ndjson") for file in files):
        count = 0
        for file in files:
            with file.open("rb") as stream:
                count += sum(chunk.count(b"\n") for chunk in iter(lambda s=stream: s.read(1 << 20), b""))  # type: ignore[misc]
    else:
        count = sum(1 for _ in source_rows(source))
    return min(count, source.max_rows or count)


def _together(recipe: Recipe, train: list[DataVolume], held: list[DataVolume]) -> DataVolume:
    rows = sum(v.rows for v in train)
    size = recipe.data.validation_size
    validation = (
        sum(v.rows for v in held) if held else min(rows, round(size * rows) if isinstance(size, float) else size)
    )
    share = 1.0 if held else (rows - validation) / max(1, rows)
    tokens = round(share * sum(v.tokens for v in train))
    supervised = round(share * sum(v.supervised_tokens for v in train))
    trained = round(share * rows)
    if isinstance(recipe, SFTRecipe) and isinstance(recipe.data, SFTData) and recipe.data.packing:
        trained = max(1, math.ceil(tokens / (FULL_ROWS * recipe.data.sequence_len)))
    return DataVolume(trained, tokens, supervised, validation, exact=False)
