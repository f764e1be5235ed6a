"""Documents on disk: what was written is read, and files that do not fit together are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.chat.encoding import Encoded, EncodedPair
from nesso_tune.data.block_encoder import Chunk, Identity
from nesso_tune.data.report import TokenCounts
from nesso_tune.data.token_store import DocumentWriter, open_documents
from tests.support.examples import examples

TOKENS = st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), max_size=12)
ENTRY = st.tuples(
    TOKENS.map(lambda tokens: ([i for i, _ in tokens], [learned for _, learned in tokens])),
    st.sampled_from(["it", "en", "und"]),
    st.integers(0, 2),
)


def written(folder, entries, parts=1):
    """Documents of (encoded, language, source, number), each a chunk of its own file."""
    writer = DocumentWriter(folder, parts)
    for i, (entry, language, source, number) in enumerate(entries):
        chunk = Chunk(f"{source}.jsonl:")
        chunk.add(entry, language, number, Identity(i, i))
        writer.write(chunk, source)
    return writer.close()


@examples(50)
@given(st.lists(ENTRY, min_size=1, max_size=10))
def test_what_is_written_is_read(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("documents")
    rows = [
        (Encoded(ids, trained), language, source, i) for i, ((ids, trained), language, source) in enumerate(entries)
    ]
    documents = open_documents(folder, **written(folder, rows))
    assert len(documents) == len(entries)
    for i, ((ids, trained), language, source) in enumerate(entries):
        assert documents.input_ids(i).tolist() == ids
        assert documents.labels(i).tolist() == Encoded(ids, trained).labels
        assert (documents.language(i), documents.sources[i], documents.lengths[i]) == (language, source, len(ids))
        assert documents.location(i) == f"{source}.jsonl:{i}"
    assert documents.kept.tolist() == list(range(len(entries)))
    some = np.arange(0, len(entries), 2)
    assert documents.counts(some) == TokenCounts(
        rows=len(some),
        tokens=sum(len(entries[i][0][0]) for i in some),
        supervised_tokens=sum(sum(entries[i][0][1]) for i in some),
    )


def test_pairs_stand_side_by_side(tmp_path):
    rows = [(EncodedPair([1, 2], [3], [4, 5, 6]), "it", 0, 1), (EncodedPair([7], [8, 9], [10]), "en", 0, 3)]
    documents = open_documents(tmp_path, **written(tmp_path, rows, parts=3))
    assert [[documents.input_ids(i, part).tolist() for part in range(3)] for i in range(2)] == [
        [[1, 2], [3], [4, 5, 6]],
        [[7], [8, 9], [10]],
    ]
    assert documents.lengths.tolist() == [6, 4]
    assert documents.counts(np.array([1])) == TokenCounts(rows=1, tokens=4, supervised_tokens=3)


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "entries.npz"])
@pytest.mark.parametrize("how", ["cut", "emptied", "gone"])
def test_files_that_do_not_fit_together_are_refused(tmp_path, name, how):
    note = written(tmp_path, [(Encoded([1, 2], [False, True]), "it", 0, i) for i in range(3)])
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes(content[:-4] if how == "cut" else b"")
    with pytest.raises((ValueError, OSError, EOFError)):
        open_documents(tmp_path, **note)
