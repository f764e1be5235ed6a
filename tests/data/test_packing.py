"""Packing: nothing split, nothing lost, full rows; and one seeded order of everything."""

from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.chat.encoding import Encoded
from nesso_tune.data.block_encoder import Chunk, Identity
from nesso_tune.data.mixture import Group
from nesso_tune.data.packing import RowStream, best_fit, sequential_rows
from nesso_tune.data.token_store import DocumentWriter, open_documents
from tests.support.examples import examples

LENGTHS = st.lists(st.integers(1, 40), max_size=120)


def reference(lengths, capacity):
    """Best-fit decreasing, said plainly: the row with the least room that suffices; among equals the last used."""
    rows, rooms = [], []
    last_used = []
    for position, length in enumerate(lengths):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            least = min(rooms[i] for i in fitting)
            row = max((i for i in fitting if rooms[i] == least), key=last_used.__getitem__)
            rows[row].append(position)
            rooms[row] -= length
            last_used[row] = position
        else:
            rows.append([position])
            rooms.append(capacity - length)
            last_used.append(position)
    return rows


@examples(100)
@given(LENGTHS, st.integers(40, 100))
def test_best_fit_is_the_textbook_algorithm(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    assert best_fit(lengths, capacity) == reference(lengths, capacity)


@examples(100)
@given(LENGTHS, st.integers(40, 100))
def test_no_document_is_split_or_lost(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    rows = best_fit(lengths, capacity)
    assert sorted(p for row in rows for p in row) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in row) <= capacity for row in rows)


def test_a_document_that_fits_no_row_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit into rows of 10"):
        best_fit([11], 10)


def test_rows_of_realistic_lengths_are_full():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.lognormal(5.2, 0.9, 5000).astype(int).clip(10, 4096))[::-1].tolist()
    rows = best_fit(lengths, 4096)
    assert sum(lengths) / (len(rows) * 4096) >= 0.98


def test_packing_many_documents_is_quick():
    lengths = sorted((1 + i * 7919 % 2000 for i in range(100_000)), reverse=True)
    rooms = []  # the least number of rows: a sorted list of rooms does the same in O(n log n)
    for length in lengths:
        i = bisect_left(rooms, length)
        room = rooms.pop(i) if i < len(rooms) else 2048
        insort(rooms, room - length)
    assert len(best_fit(lengths, 2048)) == len(rooms)


def documents_of(folder, lengths, sources=None, languages=None):
    """Documents whose every id is their own number, the second half of each learned."""
    folder.mkdir(exist_ok=True)
    writer = DocumentWriter(folder, 1)
    for i, length in enumerate(lengths):
        chunk = Chunk("rows.jsonl:")
        entry = Encoded([i] * length, [k >= length // 2 for k in range(length)])
        chunk.add(entry, (languages or {}).get(i, "it"), i + 1, Identity(i, i))
        writer.write(chunk, (sources or {}).get(i, 0))
    return open_documents(folder, **writer.close())


@pytest.fixture
def documents(tmp_path):
    return documents_of(tmp_path / "d", [3, 9, 4, 4, 4, 7, 2, 5, 8, 1, 6, 3])


@examples(25)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_packing_keeps_every_label(tmp_path_factory, lengths, epoch, seed):
    documents = documents_of(tmp_path_factory.mktemp("d"), lengths)
    every = np.arange(len(documents))
    plain = RowStream(documents, every, seed=seed).epoch(epoch)
    packed = RowStream(documents, every, seed=seed, capacity=32).epoch(epoch)
    for rows in (packed, sequential_rows(documents, every, 32)):
        assert Counter(label for row in rows for label in row["labels"]) == Counter(
            label for row in plain for label in row["labels"]
        )
        for row in rows:
            assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 32
            runs = [row["input_ids"][sum(row["seq_lengths"][:k])] for k in range(len(row["seq_lengths"]))]
            assert row["seq_lengths"] == [lengths[i] for i in runs]  # whole documents, side by side


def order(stream, epoch):
    return [tuple(stream.epoch(epoch).members(i).tolist()) for i in range(len(stream.epoch(epoch)))]


def test_the_order_is_the_seeds(documents):
    every = np.arange(len(documents))
    one, same, other = (RowStream(documents, every, seed=s, capacity=10) for s in (1, 1, 2))
    assert [order(one, e) for e in range(3)] == [order(same, e) for e in range(3)]
    assert order(one, 0) != order(one, 1) != order(one, 2)
    assert order(one, 0) != order(other, 0)
    assert order(same, 2) == order(one, 2)  # whatever was asked for before


def test_an_epoch_is_packed_longest_first(documents):
    lengths = documents.sequence_lengths.tolist()
    descending = sorted(lengths, reverse=True)
    expected = Counter(tuple(descending[i] for i in row) for row in reference(descending, 10))
    stream = RowStream(documents, np.arange(len(documents)), seed=1, capacity=10)
    assert Counter(tuple(lengths[i] for i in row) for row in order(stream, 0)) == expected


def test_unpacked_rows_are_shuffled_too(documents):
    stream = RowStream(documents, np.arange(len(documents)), seed=1)
    assert sorted(order(stream, 0)) == sorted(order(stream, 1)) == [(i,) for i in range(len(documents))]
    assert order(stream, 0) != order(stream, 1)


def test_positions_run_through_the_epochs(documents):
    stream = RowStream(documents, np.arange(len(documents)), seed=1, capacity=10)
    first, second = len(stream.epoch(0)), len(stream.epoch(1))
    assert [stream.locate(p) for p in (0, first - 1, first, first + second)] == [(0, 0), (0, first - 1), (1, 0), (2, 0)]
    assert stream[first + 1] == stream.epoch(1)[1]
    fresh = RowStream(documents, np.arange(len(documents)), seed=1, capacity=10)  # as after a resume
    assert fresh[first + second] == stream.epoch(2)[0]


@pytest.mark.parametrize(("weight", "times"), [(2.0, {2}), (0.5, {0, 1}), (1.5, {1, 2}), (1.0, {1})])
def test_weights_say_how_often_a_source_is_seen(tmp_path, weight, times):
    documents = documents_of(tmp_path / "w", [2] * 20, sources=dict.fromkeys(range(8), 1))
    groups = [Group("a", np.arange(8, 20)), Group("b", np.arange(8), weight)]
    stream = RowStream(documents, np.arange(20), seed=3, capacity=8, groups=groups)
    for epoch in range(2):
        seen = Counter(stream.epoch(epoch).records.tolist())
        assert {seen[i] for i in range(8)} == times
        assert sum(seen[i] for i in range(8)) == 8 * weight
        assert {seen[i] for i in range(8, 20)} == {1}
    if weight % 1:
        drawn = [Counter(stream.epoch(e).records.tolist()) for e in range(6)]
        assert any(drawn[0] != other for other in drawn)  # a fresh sample each epoch
        assert all(sum(d[i] for d in drawn) > 0 for i in range(8))


def test_entries_outside_the_split_are_never_seen(documents):
    some = np.array([1, 3, 5])
    stream = RowStream(documents, some, seed=1, capacity=10, groups=[Group("a", some, 1.5)])
    assert {int(i) for e in range(5) for i in stream.epoch(e).records} == {1, 3, 5}


def test_rows_behave_like_a_sequence(documents):
    rows = sequential_rows(documents, np.array([0, 2, 6]), None)
    assert len(rows) == 3
    assert rows[-1] == rows[2] == list(rows)[2] == rows[1:][1]
    assert rows["input_ids"] == [[0] * 3, [2] * 4, [6] * 2]
    assert rows[0] == {
        "input_ids": [0, 0, 0],
        "labels": [-100, 0, 0],
        "seq_lengths": [3],
        "languages": ["it"],
        "sources": [""],
    }
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            rows[beyond]
    assert len(sequential_rows(documents, np.array([], dtype=int), 10)) == 0
