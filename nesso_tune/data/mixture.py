"""What an epoch is made of: how often rows are seen, by weights or by target shares of languages or sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nesso_tune.data.privacy import name_of
from nesso_tune.data.record_reader import OTHER_KEY, language_rule
from nesso_tune.data.token_store import Documents, Ints
from nesso_tune.errors import DataError
from nesso_tune.recipes.sections import DataSection, MixtureSection, Source


@dataclass(frozen=True)
class Group:
    """Entries that are drawn together.

    Attributes:
        name: language, or alias or path of the source.
        entries: which.
        times: how often each is seen in an epoch; its fraction is a fresh sample each epoch. Above 0 it gives at
            least one entry.
        tokens: how many tokens the group gives to an epoch instead, as nearly as whole entries allow; likewise.
        key: what of the recipe asks for it.
    """

    name: str
    entries: Ints
    times: float = 1.0
    tokens: int | None = None
    key: str = ""

    def raised(self, lengths: Ints) -> bool:
        """Whether what is asked for is nearer to no entry than to one."""
        if self.tokens is not None:
            return 0 < 2 * self.tokens < int(lengths[self.entries].min(initial=2**62))
        return 0 < self.times * len(self.entries) < 0.5

    def draw(self, lengths: Ints, rng: np.random.Generator) -> Ints:
        """The entries of one epoch. `lengths` are the tokens of every entry of all documents."""
        if self.tokens is not None:
            return self._up_to(self.tokens, lengths, rng)
        whole = int(self.times)
        part = round((self.times - whole) * len(self.entries)) or int(not whole and len(self.entries) > 0)
        drawn = [self.entries] * whole
        if whole != self.times:
            drawn.append(np.sort(rng.choice(self.entries, size=part, replace=False)))
        return np.concatenate(drawn) if drawn else self.entries[:0]

    def _up_to(self, tokens: int, lengths: Ints, rng: np.random.Generator) -> Ints:
        """All entries as often as they fit, and a shuffled part of them for the rest."""
        own = int(lengths[self.entries].sum())
        shuffled = rng.permutation(self.entries)
        summed = np.cumsum(lengths[shuffled])
        rest = tokens % own if own else 0
        count = int(np.searchsorted(summed, rest, side="right"))
        before = int(summed[count - 1]) if count else 0
        if count < len(shuffled) and int(summed[count]) - rest < rest - before:
            count += 1  # one more comes nearer
        count = count or int(0 < tokens < own)
        return np.concatenate([self.entries] * (tokens // own if own else 0) + [np.sort(shuffled[:count])])


def groups_of(documents: Documents, entries: Ints, data: DataSection) -> list[Group]:
    """The groups of a recipe's entries; none where every row is seen once.

    Raises:
        DataError: if shares leave out a language or a source that is there, or name one that is not.
    """
    if data.mixture is not None:
        return _shared(documents, entries, data.mixture, data.sources)
    ruled = [any(rule.weight is not None for rule in source.rules.values()) for source in data.sources]
    if not any(ruled) and all(source.weight == 1.0 for source in data.sources):
        return []
    groups = []
    for i, source in enumerate(data.sources):
        own = entries[documents.sources[entries] == i]
        if not ruled[i]:
            key = f"data.sources.{i}.weight"
            groups += [Group(name_of(source), own, source.weight, key=key)] if len(own) else []
            continue
        for code, name in enumerate(documents.language_names):
            spoken = own[documents.languages[own] == code]
            rule = language_rule(source, name)
            times, key = source.weight, f"data.sources.{i}.weight"
            if rule is not None and rule.weight is not None:
                times, key = rule.weight, f"data.sources.{i}.rules.{name if name in source.rules else OTHER_KEY}.weight"
            groups += [Group(f"{name_of(source)} {name}", spoken, times, key=key)] if len(spoken) else []
    return groups


def _shared(documents: Documents, entries: Ints, mixture: MixtureSection, sources: Sequence[Source]) -> list[Group]:
    if mixture.by == "language":
        names, of = documents.language_names, documents.languages[entries]
    else:
        names, of = tuple(map(name_of, sources)), documents.sources[entries]
    there = {name for i, name in enumerate(names) if (of == i).any()}
    _check_names(there, mixture)
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name in there:
            members.setdefault(name if name in mixture.shares else OTHER_KEY, []).append(i)
    drawn = {name: entries[np.isin(of, own)] for name, own in members.items()}
    tokens = {name: int(documents.lengths[own].sum()) for name, own in drawn.items()}
    asked = {name: mixture.shares[name] for name in drawn if mixture.shares[name] > 0}
    if any(share > 0 and name not in drawn for name, share in mixture.shares.items()):
        missing = next(name for name, share in mixture.shares.items() if share > 0 and name not in drawn)
        raise DataError("data.mixture.shares", f"no row is of `{missing}`", "remove it")
    total = min(mixture.repeat * tokens[name] / share for name, share in asked.items())
    keys = {name: "data.mixture.shares" + (f".{name}" if mixture.by == "language" else "") for name in drawn}
    wanted = {name: max(1, round(share * total)) for name, share in asked.items()}
    return [Group(name, own, tokens=wanted.get(name, 0), key=keys[name]) for name, own in drawn.items()]


def _check_names(there: Iterable[str], mixture: MixtureSection) -> None:
    left_out = sorted(name for name in there if name not in mixture.shares)
    if left_out and OTHER_KEY not in mixture.shares:
        raise DataError(
            "data.mixture.shares", f"says nothing of {', '.join(left_out)}",
            "name a share for each, 0 leaves it out; `other` stands for all that are not named",
        )  # fmt: skip


def mixture_warnings(documents: Documents, groups: Sequence[Group], train: Ints, data: DataSection) -> list[str]:
    """Weights and shares that give less than one row, sources that give none, and weights of languages not there."""
    said = [
        f"{group.key} asks for less than one of {len(group.entries):,} rows: each epoch has one; raise it, or leave "
        "them out"
        for group in groups if group.raised(documents.lengths)
    ]  # fmt: skip
    for i, source in enumerate(data.sources):
        own = train[documents.sources[train] == i]
        if not len(own):
            said.append(f"data.sources.{i} gives no row to train on: see what was dropped, or remove it")
            continue
        spoken = {documents.language_names[code] for code in np.unique(documents.languages[own])}
        for code, rule in source.rules.items():
            if rule.weight is not None and code != OTHER_KEY and code not in spoken:
                said.append(f"data.sources.{i}.rules.{code}.weight has no effect: no row is of `{code}`")
    return said


def mixture_report(documents: Documents, groups: Sequence[Group], drawn: Ints) -> list[dict[str, Any]]:
    """What the first epoch is made of: per group the rows that are there and those drawn, with their share of tokens.

    Without groups, the languages stand for them.
    """
    listed = list(groups) or [
        Group(name, drawn[documents.languages[drawn] == i]) for i, name in enumerate(documents.language_names)
    ]
    whole = documents.counts(drawn)
    out = []
    for group in listed:
        if not len(group.entries):
            continue
        counts = documents.counts(drawn[np.isin(drawn, group.entries)])
        shares = {
            f"share_of_{name}": round(counts[name] / max(1, whole[name]), 4) for name in ("tokens", "supervised_tokens")
        }
        out.append({"name": group.name, "rows_there": len(group.entries), **counts, **shares})
    return out
