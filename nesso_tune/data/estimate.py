"""How many rows well-known data sets have, by their pages on the hub: for plans made before anything is fetched."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.conversation import Message
from nesso_tune.data.files import expand, is_local
from nesso_tune.data.pipeline import build_documents
from nesso_tune.data.prepare import cached_only, check_size, prepare_data
from nesso_tune.data.record_reader import DropCounter, make_record_reader, read_examples
from nesso_tune.data.sources import count_records, source_records
from nesso_tune.errors import ModelError, RunEnvironmentError
from nesso_tune.planning.plan import DataVolume
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import SFTData, Source

ROWS: dict[tuple[str, str | None, str], int] = {  # (id, subset, split)
    ("DeepMount00/OpenItalianData", None, "train"): 2_140_000,
    ("HuggingFaceTB/smoltalk", "all", "train"): 1_043_917,
    ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"): 61_135,
    ("anakin87/evol-dpo-ita-reranked", None, "train"): 19_769,
    ("hiyouga/glaive-function-calling-v2-sharegpt", None, "train"): 100_561,
}


def stated_rows(source: Source) -> int | None:
    """Rows of a hub data set as its page states them; None if it is not one of these."""
    rows = ROWS.get((source.path, source.subset, source.split))
    return None if rows is None else min(rows, source.max_rows or rows)


SAMPLE = 500  # rows of each source
FULL_ROWS = 0.99  # how full best-fit packing leaves a row of chat data
CHARACTERS = 3.8  # of Italian and English chat, a token of a large vocabulary: assumed where no tokenizer is at hand
TURN = 5  # tokens around each turn
ROW, LEARNED = 500, 300  # tokens and supervised tokens of a conversation or pair: assumed where no row is at hand
SAMPLED = f"from the first {SAMPLE} rows of each source"
WITHOUT_TOKENIZER = f"at {CHARACTERS} characters a token, the tokenizer is not at hand"
STATED = f"rows as the hub states them, {ROW} tokens a row assumed: `nesso-tune prepare` fetches and counts them"


def find_volume(recipe: Recipe) -> DataVolume | None:
    """What one epoch holds, or None where too little is known (hub data that was never fetched).

    Raises:
        DataError: if a local file is missing or wrong.
    """
    sources = [*recipe.data.sources, *recipe.data.validation_sources]
    for source in sources:
        if is_local(source.path):
            expand(source.path)
    chat = _chat(recipe)
    if chat is not None and all(is_local(source.path) for source in sources) and cached_only(recipe):
        return prepare_data(recipe).volume
    volumes = [_estimate(recipe, source, chat) for source in sources]
    known = [volume for volume in volumes if volume is not None]
    if len(known) < len(volumes):
        return None
    n = len(recipe.data.sources)
    return _together(recipe, known[:n], known[n:])


def _chat(recipe: Recipe) -> ChatTokenizer | None:
    """The base's tokenizer if it is at hand."""
    if not local_path(recipe.model.base).is_dir():
        return None
    try:
        return chat_tokenizer(recipe.model, recipe.chat)
    except (ModelError, RunEnvironmentError):
        return None


def _estimate(recipe: Recipe, source: Source, chat: ChatTokenizer | None) -> DataVolume | None:
    """Usable rows and tokens of a source, from its first rows and their number."""
    if not is_local(source.path):
        rows = stated_rows(source)
        if rows is None:
            return None
        rows = round(source.weight * rows)
        return DataVolume(rows, rows * ROW, rows * LEARNED, exact=False, basis=STATED)
    sampled = source.model_copy(update={"max_rows": min(SAMPLE, source.max_rows or SAMPLE)})
    read, kept, tokens, supervised, dropped = _sample(recipe, sampled, chat)
    total = max(count_records(source), read)  # a last line may lack its line break
    ratio = source.weight * total / max(1, read)
    rows, all_tokens, learned = (round(ratio * n) for n in (kept, tokens, supervised))
    basis = SAMPLED if chat is not None else WITHOUT_TOKENIZER
    shares = {reason: n / max(1, read) for reason, n in dropped.items()}
    return DataVolume(rows, all_tokens, learned, exact=False, basis=basis, dropped=shares)


def _sample(recipe: Recipe, source: Source, chat: ChatTokenizer | None) -> tuple[int, int, int, int, dict[str, int]]:
    """Rows read, rows kept, tokens, supervised tokens, and why rows were dropped."""
    if chat is not None:
        with TemporaryDirectory() as folder:
            report = build_documents(Path(folder), recipe, [source], chat)["report"]
        names = ("rows_read", "rows_kept", "tokens", "supervised_tokens", "dropped")
        return tuple(report[name] for name in names)  # type: ignore[return-value]
    dropped = DropCounter()
    read = kept = tokens = supervised = 0
    trained = recipe.data.roles_to_train if isinstance(recipe.data, SFTData) else ("assistant",)
    for item in read_examples(
        make_record_reader(source, recipe.method, recipe.data.clean), source_records(source), dropped
    ):
        read += 1
        if item is None:
            continue
        sizes = [(turn.role in trained, _size(turn)) for turn in item.turns]
        length = sum(size for _, size in sizes)
        if length <= recipe.data.sequence_len * (1 if recipe.method == "sft" else 2):
            kept, tokens = kept + 1, tokens + length
            supervised += sum(size for learned, size in sizes if learned)
    return read, kept, tokens, supervised, dict(dropped)


def _size(turn: Message) -> int:
    said = len(turn.content) + sum(len(str(call)) for call in turn.tool_calls)
    return round(said / CHARACTERS) + TURN


def _together(recipe: Recipe, train: list[DataVolume], held: list[DataVolume]) -> DataVolume:
    rows = sum(v.rows for v in train)
    size = recipe.data.validation_size
    if not held:
        check_size(size, rows)
    validation = sum(v.rows for v in held) if held else int(size * rows) if isinstance(size, float) else size
    share = 1.0 if held else (rows - validation) / max(1, rows)
    tokens = round(share * sum(v.tokens for v in train))
    supervised = round(share * sum(v.supervised_tokens for v in train))
    trained = round(share * rows)
    if isinstance(recipe, SFTRecipe) and isinstance(recipe.data, SFTData) and recipe.data.packing:
        trained = max(1, math.ceil(tokens / (FULL_ROWS * recipe.data.sequence_len)))
    weakest = max((v.basis for v in [*train, *held]), key=(SAMPLED, WITHOUT_TOKENIZER, STATED).index)
    if recipe.data.mixture is not None or any(s.rules for s in recipe.data.sources):
        weakest = f"{weakest}; shares and weights of languages are not in it"
    dropped: dict[str, float] = {}
    for part in train:
        for reason, lost in part.dropped.items():
            dropped[reason] = dropped.get(reason, 0.0) + lost * part.rows / max(1, rows)
    shown = {reason: lost for reason, lost in sorted(dropped.items(), key=lambda pair: -pair[1]) if lost >= 0.005}
    return DataVolume(trained, tokens, supervised, validation, exact=False, basis=weakest, dropped=shown)
