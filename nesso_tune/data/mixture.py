"""Composition of an epoch: how often each record is drawn, by source weights or by target shares of the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nesso_tune.data.privacy import source_name
from nesso_tune.data.record_reader import OTHER_KEY, language_rule
from nesso_tune.data.report import GroupReport
from nesso_tune.data.token_store import Documents, IntArray
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import DataSection, MixtureSection, Source


@dataclass(frozen=True)
class Group:
    """Records that are drawn together.

    Attributes:
        name: language, or alias or path of the source.
        records: indices into the token store.
        repeats: times that each record is drawn per epoch. The fraction is a new sample each epoch; above 0 it gives
            at least one record.
        tokens: tokens per epoch, instead of `repeats`: met as closely as whole records allow, with at least one record
            if above 0.
        key: recipe key that sets `repeats` or `tokens`.
    """

    name: str
    records: IntArray
    repeats: float = 1.0
    tokens: int | None = None
    key: str = ""

    def raised(self, lengths: IntArray) -> bool:
        """Whether one record is drawn although the recipe's value rounds to none."""
        if self.tokens is not None:
            return 0 < 2 * self.tokens < int(lengths[self.records].min(initial=2**62))
        return 0 < self.repeats * len(self.records) < 0.5

    def draw(self, lengths: IntArray, rng: np.random.Generator) -> IntArray:
        """The records of one epoch, with repetitions. `lengths`: tokens of each record in the token store."""
        if self.tokens is not None:
            return self._draw_tokens(self.tokens, lengths, rng)
        whole = int(self.repeats)
        part = round((self.repeats - whole) * len(self.records)) or int(not whole and len(self.records) > 0)
        drawn = [self.records] * whole
        if whole != self.repeats:
            drawn.append(np.sort(rng.choice(self.records, size=part, replace=False)))
        return np.concatenate(drawn) if drawn else self.records[:0]

    def _draw_tokens(self, tokens: int, lengths: IntArray, rng: np.random.Generator) -> IntArray:
        """All records as often as they fit into `tokens`, and a random sample of them for the remainder."""
        own = int(lengths[self.records].sum())
        shuffled = rng.permutation(self.records)
        summed = np.cumsum(lengths[shuffled])
        rest = tokens % own if own else 0
        count = int(np.searchsorted(summed, rest, side="right"))
        before = int(summed[count - 1]) if count else 0
        if count < len(shuffled) and int(summed[count]) - rest < rest - before:
            count += 1  # one more record is closer to the target
        count = count or int(0 < tokens < own)
        return np.concatenate([self.records] * (tokens // own if own else 0) + [np.sort(shuffled[:count])])


def mixture_groups(documents: Documents, records: IntArray, data: DataSection) -> list[Group]:
    """The groups of a recipe; empty where each record is drawn once.

    Raises:
        DataError: if the shares omit a language or source of the data, or name one that is not in the data.
    """
    if data.mixture is not None:
        return _groups_by_share(documents, records, data.mixture, data.sources)
    return _groups_by_weight(documents, records, data.sources)


def _groups_by_weight(documents: Documents, records: IntArray, sources: Sequence[Source]) -> list[Group]:
    """One group per source, or per language of a source with weights by language."""
    by_language = [any(rule.weight is not None for rule in source.rules.values()) for source in sources]
    if not any(by_language) and all(source.weight == 1.0 for source in sources):
        return []
    groups = []
    for i, source in enumerate(sources):
        name, key = source_name(source), f"data.sources.{i}.weight"
        own = records[documents.sources[records] == i]
        if not by_language[i]:
            groups.append(Group(name, own, source.weight, key=key))
            continue
        for code, language in enumerate(documents.language_names):
            of_language = own[documents.languages[own] == code]
            rule = language_rule(source, language)
            if rule is not None and rule.weight is not None:
                rule_key = f"data.sources.{i}.rules.{language if language in source.rules else OTHER_KEY}.weight"
                groups.append(Group(f"{name} {language}", of_language, rule.weight, key=rule_key))
            else:
                groups.append(Group(f"{name} {language}", of_language, source.weight, key=key))
    return [group for group in groups if len(group.records)]


def _groups_by_share(
    documents: Documents, records: IntArray, mixture: MixtureSection, sources: Sequence[Source]
) -> list[Group]:
    """One group per language or source that has a share; `other` holds those without a share of their own.

    The epoch is as long as it can be without a group being find_duplicates more than `mixture.repeat` times.
    """
    if mixture.by == "language":
        names, codes = documents.language_names, documents.languages[records]
    else:
        names, codes = tuple(map(source_name, sources)), documents.sources[records]
    present = {name for i, name in enumerate(names) if (codes == i).any()}
    _check_shares(present, mixture)
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name in present:
            members.setdefault(name if name in mixture.shares else OTHER_KEY, []).append(i)
    missing = next((name for name, share in mixture.shares.items() if share > 0 and name not in members), None)
    if missing is not None:
        raise DataError("data.mixture.shares", f"no row belongs to `{missing}`", "remove it")
    grouped = {name: records[np.isin(codes, indices)] for name, indices in members.items()}
    shares = {name: mixture.shares[name] for name in grouped if mixture.shares[name] > 0}
    total = min(mixture.repeat * int(documents.lengths[grouped[name]].sum()) / share for name, share in shares.items())
    tokens = {name: max(1, round(share * total)) for name, share in shares.items()}
    keys = {name: "data.mixture.shares" + (f".{name}" if mixture.by == "language" else "") for name in grouped}
    return [Group(name, own, tokens=tokens.get(name, 0), key=keys[name]) for name, own in grouped.items()]


def _check_shares(present: Iterable[str], mixture: MixtureSection) -> None:
    """Raises DataError if a language or source of the data has no share."""
    left_out = sorted(name for name in present if name not in mixture.shares)
    if left_out and OTHER_KEY not in mixture.shares:
        raise DataError(
            "data.mixture.shares", f"has no share for {', '.join(left_out)}",
            "set a share for each (0 leaves it out), or for `other`, which stands for all that are not named",
        )  # fmt: skip


def mixture_warnings(documents: Documents, groups: Sequence[Group], train: IntArray, data: DataSection) -> list[str]:
    """Warnings about weights and shares below one row, sources without training rows, and weights without effect."""
    warnings = [
        f"{group.key} selects less than 1 of {len(group.records):,} rows, so each epoch draws 1; raise it, or leave "
        "these rows out"
        for group in groups if group.raised(documents.lengths)
    ]  # fmt: skip
    for i, source in enumerate(data.sources):
        own = train[documents.sources[train] == i]
        if not len(own):
            warnings.append(f"data.sources.{i} has no training rows: check the dropped rows, or remove the source")
            continue
        present = {documents.language_names[code] for code in np.unique(documents.languages[own])}
        for language, rule in source.rules.items():
            if rule.weight is not None and language != OTHER_KEY and language not in present:
                warnings.append(f"data.sources.{i}.rules.{language}.weight has no effect: no row is in `{language}`")
    return warnings


def mixture_report(documents: Documents, groups: Sequence[Group], drawn: IntArray) -> tuple[GroupReport, ...]:
    """Composition of the first epoch by group, or by language if there are no groups.

    Args:
        documents: the token store.
        groups: what `mixture_groups` returned.
        drawn: the records of the first epoch, with repetitions.
    """
    listed = list(groups) or [
        Group(name, drawn[documents.languages[drawn] == i]) for i, name in enumerate(documents.language_names)
    ]
    total = documents.counts(drawn)
    reports = []
    for group in listed:
        if not len(group.records):
            continue
        counts = documents.counts(drawn[np.isin(drawn, group.records)])
        reports.append(
            GroupReport(
                group.name, len(group.records), counts.rows, counts.tokens, counts.supervised_tokens,
                share_of_tokens=round(counts.tokens / max(1, total.tokens), 4),
                share_of_supervised_tokens=round(counts.supervised_tokens / max(1, total.supervised_tokens), 4),
            )
        )  # fmt: skip
    return tuple(reports)
