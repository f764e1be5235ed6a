"""Size of an epoch without preparing the data: from its first rows, or from what is known of public data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nesso_tune.chat.tokenizer import ChatTokenizer, chat_tokenizer
from nesso_tune.conversation import Message
from nesso_tune.data.block_encoder import BlockCounters, BlockEncoder, no_usable_rows
from nesso_tune.data.cache_key import is_prepared
from nesso_tune.data.columns import UnreadCounts
from nesso_tune.data.files import is_local
from nesso_tune.data.privacy import Privacy
from nesso_tune.data.reasoning import check_reasoning
from nesso_tune.data.record_reader import Drop, DropCounter, make_record_reader, read_examples
from nesso_tune.data.report import unread_warnings
from nesso_tune.data.sources import check_sources, count_records, source_blocks, source_records
from nesso_tune.errors import ModelError, RunEnvironmentError
from nesso_tune.planning.plan import DataVolume
from nesso_tune.recipes.builtin import local_path
from nesso_tune.recipes.data_rules import check_validation_size
from nesso_tune.recipes.schema import Recipe, SFTRecipe
from nesso_tune.recipes.sections import SFTData, Source

CHARACTERS_PER_TOKEN = 3.8  # Italian and English chat with a large vocabulary; assumed if there is no tokenizer
_TOKENS_PER_TURN = 5  # control tokens around each turn
_TOKENS_PER_ROW, _SUPERVISED_PER_ROW = 500, 300  # assumed if no row is available
_SAMPLE_ROWS = 500  # of each source
_LENGTH_SPREAD = 2.0  # mean document length over the tokens / mean length, if lengths vary by about their mean
_PACKING_FILL = 0.99  # typical fill of best-fit packed rows of chat data
_PUBLISHED_ROWS: dict[tuple[str, str | None, str], int] = {  # (hub id, subset, split) -> rows on its hub page
    ("DeepMount00/OpenItalianData", None, "train"): 2_140_000,
    ("HuggingFaceTB/smoltalk", "all", "train"): 1_043_917,
    ("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs"): 61_135,
    ("anakin87/evol-dpo-ita-reranked", None, "train"): 19_769,
    ("hiyouga/glaive-function-calling-v2-sharegpt", None, "train"): 100_561,
}
# The basis of an estimate, from the most to the least precise.
_FROM_SAMPLE = f"from the first {_SAMPLE_ROWS} rows of each source"
_WITHOUT_TOKENIZER = f"at {CHARACTERS_PER_TOKEN} characters per token, the tokenizer is not available"
_FROM_HUB_PAGE = (
    f"rows as published on the hub, {_TOKENS_PER_ROW} tokens per row assumed: "
    "`nesso-tune prepare` downloads and counts them"
)
_BASES = (_FROM_SAMPLE, _WITHOUT_TOKENIZER, _FROM_HUB_PAGE)


def estimate_volume(recipe: Recipe) -> DataVolume | None:
    """Size of one epoch: exact if the data is prepared, else estimated; None for an unknown data set of the hub.

    Raises:
        DataError: if a local file is missing or cannot be read.
    """
    sources = [*recipe.data.sources, *recipe.data.validation_sources]
    check_sources(recipe)
    chat = _available_tokenizer(recipe)
    if chat is not None and is_prepared(recipe, chat):
        from nesso_tune.data.prepare import prepare_data  # with numpy, a fifth of the time of `check`

        return prepare_data(recipe).volume
    volumes = [_source_volume(recipe, source, chat) for source in sources]
    known = [volume for volume in volumes if volume is not None]
    if len(known) < len(volumes):
        return None
    n = len(recipe.data.sources)
    volume = _epoch_volume(recipe, [of for of, _ in known[:n]], [of for of, _ in known[n:]])
    privacy = Privacy(recipe.data)
    counts = [(dict(unread.rows.most_common()), dict(unread.texts.most_common())) for _, unread in known]
    unread, texts = privacy.shown_unread(counts[:n])
    held_unread, held_texts = privacy.shown_unread(counts[n:], validation=True)
    return replace(volume, unread={**held_unread, **unread}, warnings=tuple(unread_warnings({**held_texts, **texts})))


def _available_tokenizer(recipe: Recipe) -> ChatTokenizer | None:
    """The tokenizer of the base model, if the model is a local folder and has a usable one."""
    if not local_path(recipe.model.base).is_dir():
        return None
    try:
        return chat_tokenizer(recipe.model, recipe.chat)
    except (ModelError, RunEnvironmentError):
        return None


def _source_volume(
    recipe: Recipe, source: Source, chat: ChatTokenizer | None
) -> tuple[DataVolume, UnreadCounts] | None:
    """Estimated usable rows and tokens of one source, and what is not read of its first rows."""
    if not is_local(source.path):
        published = _published_rows(source)
        if published is None:
            return None
        rows = round(source.weight * published)
        tokens, supervised = rows * _TOKENS_PER_ROW, rows * _SUPERVISED_PER_ROW
        return DataVolume(rows, tokens, supervised, exact=False, basis=_FROM_HUB_PAGE), UnreadCounts()
    limited = source.model_copy(update={"max_rows": min(_SAMPLE_ROWS, source.max_rows or _SAMPLE_ROWS)})
    sample = _encode_sample(recipe, limited, chat) if chat is not None else _measure_sample(recipe, limited)
    total = max(count_records(source), sample.read)  # a last line may lack its line break
    ratio = source.weight * total / max(1, sample.read)
    rows, tokens, supervised = (round(ratio * n) for n in (sample.kept, sample.tokens, sample.supervised_tokens))
    basis = _FROM_SAMPLE if chat is not None else _WITHOUT_TOKENIZER
    dropped = {reason: n / max(1, sample.read) for reason, n in sample.dropped.items()}
    return DataVolume(rows, tokens, supervised, exact=False, basis=basis, dropped=dropped), sample.unread


def _published_rows(source: Source) -> int | None:
    rows = _PUBLISHED_ROWS.get((source.path, source.subset, source.split))
    return None if rows is None else min(rows, source.max_rows or rows)


@dataclass(frozen=True)
class _Sample:
    """The first rows of a source: rows read and kept, tokens of those, dropped rows by reason, and unread keys."""

    read: int
    kept: int
    tokens: int
    supervised_tokens: int
    dropped: Mapping[str, int]
    unread: UnreadCounts


def _encode_sample(recipe: Recipe, source: Source, chat: ChatTokenizer) -> _Sample:
    """A sample whose tokens are counted. Near duplicates are not looked for."""
    data, contamination = recipe.data, None
    check_reasoning(data, chat.template)
    if data.clean.decontaminate is not None:
        from nesso_tune.data.filtering import read_evaluation_texts

        contamination = read_evaluation_texts(data.clean.decontaminate).find_in
    encoder = BlockEncoder([make_record_reader(source, recipe.method, data.clean)], data, chat, contamination)
    counters, kept, tokens, supervised = BlockCounters(1), 0, 0, 0
    seen: set[int] = set()
    for block in map(encoder, ((0, block) for block in source_blocks(source))):
        counters.add(block)
        for identity, length, supervised_count in block.chunk.sizes():
            if data.clean.duplicates == "drop" and identity in seen:
                counters.drop(0, Drop(block.chunk.prefix, "duplicate", ""))
                continue
            seen.add(identity)
            kept, tokens, supervised = kept + 1, tokens + length, supervised + supervised_count
    if kept == 0:
        raise no_usable_rows([source], counters)
    return _Sample(counters.rows[0], kept, tokens, supervised, dict(counters.dropped[0]), counters.unread[0])


def _measure_sample(recipe: Recipe, source: Source) -> _Sample:
    """A sample whose tokens are estimated from the number of characters."""
    dropped, unread = DropCounter(), UnreadCounts()
    read = kept = tokens = supervised = 0
    trained_roles = recipe.data.roles_to_train if isinstance(recipe.data, SFTData) else ("assistant",)
    limit = recipe.data.sequence_len * (1 if recipe.method == "sft" else 2)
    for item in read_examples(
        make_record_reader(source, recipe.method, recipe.data.clean), source_records(source), dropped, unread
    ):
        read += 1
        if item is None:
            continue
        sizes = [(turn.role in trained_roles, _tokens_of(turn)) for turn in item.turns]
        length = sum(size for _, size in sizes)
        if length <= limit:
            kept, tokens = kept + 1, tokens + length
            supervised += sum(size for is_trained, size in sizes if is_trained)
    return _Sample(read, kept, tokens, supervised, dict(dropped), unread)


def _tokens_of(turn: Message) -> int:
    characters = len(turn.content) + sum(len(str(call)) for call in turn.tool_calls)
    return round(characters / CHARACTERS_PER_TOKEN) + _TOKENS_PER_TURN


def _epoch_volume(recipe: Recipe, train: Sequence[DataVolume], validation: Sequence[DataVolume]) -> DataVolume:
    """Size of one epoch of the training sources, after the validation rows are held out, and packed."""
    rows = sum(volume.rows for volume in train)
    size = recipe.data.validation_size
    if validation:
        validation_rows, train_share = sum(volume.rows for volume in validation), 1.0
    else:
        check_validation_size(size, rows)
        validation_rows = int(size * rows) if isinstance(size, float) else size
        train_share = (rows - validation_rows) / max(1, rows)
    tokens = round(train_share * sum(volume.tokens for volume in train))
    supervised = round(train_share * sum(volume.supervised_tokens for volume in train))
    train_rows = round(train_share * rows)
    if isinstance(recipe, SFTRecipe) and isinstance(recipe.data, SFTData) and recipe.data.packing:
        train_rows = max(1, math.ceil(tokens / (_PACKING_FILL * recipe.data.sequence_len)))
    basis = max((volume.basis for volume in [*train, *validation]), key=_BASES.index)
    if recipe.data.mixture is not None or any(source.rules for source in recipe.data.sources):
        basis = f"{basis}; without mixture shares and weights by language"
    dropped: dict[str, float] = {}
    for volume in train:
        for reason, share in volume.dropped.items():
            dropped[reason] = dropped.get(reason, 0.0) + share * volume.rows / max(1, rows)
    mean = tokens / max(1, round(train_share * rows))
    document = min(_LENGTH_SPREAD * mean, float(recipe.data.sequence_len))
    frequent = {reason: share for reason, share in sorted(dropped.items(), key=lambda pair: -pair[1]) if share >= 0.005}
    return DataVolume(train_rows, tokens, supervised, validation_rows, exact=False, basis=basis, dropped=frequent,
                      document_length=document)  # fmt: skip
