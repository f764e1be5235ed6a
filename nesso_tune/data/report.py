"""The report on prepared data: what was read, dropped and kept, as frozen dataclasses with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from nesso_tune.errors import shortened

Unread = Mapping[str, Mapping[str, int]]  # source -> column, or path of a message key -> rows that have it
_MAX_KEYS = 10  # in a message


@dataclass(frozen=True)
class TokenCounts:
    """Size of a set of records.

    Attributes:
        rows: number of records.
        tokens: number of tokens, without padding.
        supervised_tokens: tokens that contribute to the loss.
    """

    rows: int
    tokens: int
    supervised_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class SourceReport:
    """What was read from one source.

    Attributes:
        path, alias: as in the recipe; the JSON form has no `alias` key for a source without one.
        rows_read: rows before any was dropped.
        dropped: number of dropped rows by reason.
        unread: number of rows with each column or message key (`messages.name`) that was not read.
        unread_texts: number of rows in which it holds text.
        rows, tokens, supervised_tokens: size of the rows that were kept, see `TokenCounts`. The JSON form also has
            `supervised_share`: supervised tokens / tokens.
    """

    path: str
    alias: str | None
    rows_read: int
    dropped: Mapping[str, int]
    unread: Mapping[str, int]
    unread_texts: Mapping[str, int]
    rows: int
    tokens: int
    supervised_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        share = round(self.supervised_tokens / max(1, self.tokens), 4)
        return {**{key: value for key, value in asdict(self).items() if value is not None}, "supervised_share": share}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{"alias": None, **{key: value for key, value in raw.items() if key != "supervised_share"}})


@dataclass(frozen=True)
class Anomaly:
    """An anomaly in rows that were kept: the number of affected rows and the location of the first."""

    rows: int
    example: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class PersonalData:
    """Personal data of one kind in the rows read.

    Attributes:
        rows, values: affected rows, and values in them.
        example: location of the first row.
        context: the text around the first value, with placeholders for all values; empty for a private source.
    """

    rows: int
    values: int
    example: str
    context: str = ""

    def __add__(self, other: PersonalData) -> PersonalData:
        """The sum, with the example of the first."""
        return replace(self, rows=self.rows + other.rows, values=self.values + other.values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class PackingReport:
    """Packing of the first epoch.

    Attributes:
        rows: packed rows, or records where nothing is packed.
        fill: share of the positions of these rows that hold a token.
        unpacked: packing was disabled because the model cannot isolate packed documents.
    """

    rows: int
    fill: float
    unpacked: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `unpacked` only where it is true."""
        return {"rows": self.rows, "fill": self.fill, **({"unpacked": True} if self.unpacked else {})}


@dataclass(frozen=True)
class GroupReport:
    """Composition of the first epoch: one language, source, or language of a source.

    Attributes:
        name: of the group.
        rows_there: records available for training.
        rows, tokens, supervised_tokens: size of the records drawn, with repetitions.
        share_of_tokens, share_of_supervised_tokens: share of the epoch, between 0 and 1.
    """

    name: str
    rows_there: int
    rows: int
    tokens: int
    supervised_tokens: int
    share_of_tokens: float
    share_of_supervised_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class WholeRows:
    """The rows that fit into a sequence length: their number, and their tokens."""

    rows: int
    tokens: int

    def to_dict(self) -> dict[str, int]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CorpusReport:
    """What was read from a list of sources and encoded; cached next to the tokens.

    Attributes:
        rows_read: rows of all sources.
        rows_kept: rows that were encoded and kept.
        dropped: number of dropped rows by reason, the most frequent first.
        examples_of_dropped: location of the first row dropped for each reason.
        tokens, supervised_tokens: of the rows kept.
        languages: size of the rows kept, by language code.
        sources: one report per source, in the order of the recipe.
        duplicates: kept rows that repeat an earlier row exactly.
        anomalies: anomalies of kept rows by name; `oddities` in the JSON form.
        lengths: histogram of lengths in tokens, see `anomalies.length_histograms`.
        whole_rows: by sequence length, a power of two, the rows that fit into it; of all rows that were encoded, with
            duplicates and rows that are too long. The last length holds all of them.
        preferences: figures of preference pairs, see `anomalies.preference_statistics`; None for conversations.
        personal_data: what was found by kind, the most frequent first; None if the recipe does not search.
    """

    rows_read: int
    rows_kept: int
    dropped: Mapping[str, int]
    examples_of_dropped: Mapping[str, str]
    tokens: int
    supervised_tokens: int
    languages: Mapping[str, TokenCounts]
    sources: tuple[SourceReport, ...]
    duplicates: int
    anomalies: Mapping[str, Anomaly]
    lengths: Mapping[str, Any]
    whole_rows: Mapping[int, WholeRows]
    preferences: Mapping[str, Any] | None = None
    personal_data: Mapping[str, PersonalData] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the keys `preferences` and `personal_data` are left out where they are None."""
        raw = {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "dropped": dict(self.dropped),
            "examples_of_dropped": dict(self.examples_of_dropped),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "languages": {code: counts.to_dict() for code, counts in self.languages.items()},
            "sources": [source.to_dict() for source in self.sources],
            "duplicates": self.duplicates,
            "oddities": {name: anomaly.to_dict() for name, anomaly in self.anomalies.items()},
            "lengths": dict(self.lengths),
            "whole_rows": {str(limit): whole.to_dict() for limit, whole in self.whole_rows.items()},
        }
        if self.personal_data is not None:
            raw["personal_data"] = {kind: found.to_dict() for kind, found in self.personal_data.items()}
        return raw if self.preferences is None else {**raw, "preferences": dict(self.preferences)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        fields = dict(raw)
        fields["languages"] = {code: TokenCounts(**counts) for code, counts in fields["languages"].items()}
        fields["sources"] = tuple(map(SourceReport.from_dict, fields["sources"]))
        fields["anomalies"] = {name: Anomaly(**found) for name, found in fields.pop("oddities").items()}
        fields["whole_rows"] = {int(limit): WholeRows(**of) for limit, of in fields["whole_rows"].items()}
        if "personal_data" in fields:
            fields["personal_data"] = {kind: PersonalData(**found) for kind, found in fields["personal_data"].items()}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class DataReport(CorpusReport):
    """The report of `prepare_data`: the corpus, and how it is split, mixed and packed.

    Attributes:
        validation_overlap: training rows that share a prompt with a validation row.
        train: size of the first epoch, with repetitions.
        validation: size of the validation rows.
        packing: packed rows of the first epoch.
        mixture: composition of the first epoch.
        fingerprint: hash of the tokens and of everything that decides their order; the same for the same records in
            files of any type.
        cache_hit: whether all of it was in the cache.
        unread: rows with each column or message key that was not read, by source; validation sources are included. A
            private source has its number, and numbers instead of the names of its keys.
        unread_texts: the same for the rows in which it holds text.
        warnings: what to check before training on this data.
    """

    validation_overlap: int
    train: TokenCounts
    validation: TokenCounts
    packing: PackingReport
    mixture: tuple[GroupReport, ...]
    fingerprint: str
    cache_hit: bool
    unread: Unread
    unread_texts: Unread
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as `nesso-tune prepare --json` prints it."""
        return {
            **super().to_dict(),
            "validation_overlap": self.validation_overlap,
            "train": self.train.to_dict(),
            "validation": self.validation.to_dict(),
            "packing": self.packing.to_dict(),
            "mixture": [group.to_dict() for group in self.mixture],
            "fingerprint": self.fingerprint,
            "cache_hit": self.cache_hit,
            "unread": {source: dict(keys) for source, keys in self.unread.items()},
            "unread_texts": {source: dict(keys) for source, keys in self.unread_texts.items()},
            "warnings": list(self.warnings),
        }


def unread_warnings(texts: Unread) -> list[str]:
    """A warning for each source with text that was not read.

    Args:
        texts: rows with text in each unread column or message key, by source.
    """
    remedy = (
        "name it in the source (input_field, system_field, …) or convert it with a reader of your own, "
        "unless the model should not see it"
    )
    return [f"{source}: text that is not read: {listed_keys(keys)}; {remedy}" for source, keys in texts.items() if keys]


def listed_keys(keys: Mapping[str, int]) -> str:
    """Unread keys with their rows, e.g. `context (6 rows), id (6 rows)`."""
    shown = [f"{shortened(key) or chr(34) * 2} ({rows:,} row{'s' if rows != 1 else ''})" for key, rows in keys.items()]
    more = len(shown) - _MAX_KEYS
    return ", ".join([*shown[:_MAX_KEYS], *([f"and {more:,} more"] if more > 0 else [])])
