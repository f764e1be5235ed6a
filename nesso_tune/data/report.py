"""The report on prepared data: what was read, dropped and kept, as frozen dataclasses with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


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
        rows, tokens, supervised_tokens: size of the rows that were kept, see `TokenCounts`.
    """

    path: str
    alias: str | None
    rows_read: int
    dropped: Mapping[str, int]
    rows: int
    tokens: int
    supervised_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**{"alias": None, **raw})


@dataclass(frozen=True)
class Anomaly:
    """An anomaly in rows that were kept: the number of affected rows and the location of the first."""

    rows: int
    example: str

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
        preferences: figures of preference pairs, see `anomalies.preference_statistics`; None for conversations.
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
    preferences: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the key `preferences` is left out where it is None."""
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
        }
        return raw if self.preferences is None else {**raw, "preferences": dict(self.preferences)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        fields = dict(raw)
        fields["languages"] = {code: TokenCounts(**counts) for code, counts in fields["languages"].items()}
        fields["sources"] = tuple(map(SourceReport.from_dict, fields["sources"]))
        fields["anomalies"] = {name: Anomaly(**found) for name, found in fields.pop("oddities").items()}
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
        fingerprint: hash of the tokens and of everything that decides their order.
        cache_hit: whether all of it was in the cache.
        warnings: what to check before training on this data.
    """

    validation_overlap: int
    train: TokenCounts
    validation: TokenCounts
    packing: PackingReport
    mixture: tuple[GroupReport, ...]
    fingerprint: str
    cache_hit: bool
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
            "warnings": list(self.warnings),
        }
