"""Hub data sets, read with `datasets` from a small one in a local folder."""

import json

import pytest

from nesso_tune.data import sources
from nesso_tune.data.blocks import BLOCK_RECORDS, limit_records, with_locations
from nesso_tune.recipes.sections import Source


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A data set of more than two blocks of rows; the second row has keys that the first lacks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Perché {i}?"}], "n": i} for i in range(2 * BLOCK_RECORDS + 5)]
    rows[1]["messages"].append({"role": "assistant", "content": "Così.", "name": "Ada"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    sources._load_dataset.cache_clear()
    yield Source(path=str(folder)), rows
    sources._load_dataset.cache_clear()


def test_rows_are_read_in_blocks_unchanged(data_set):
    source, rows = data_set
    blocks = list(sources.hub_blocks(source))
    assert [block.count() for block in blocks] == [BLOCK_RECORDS, BLOCK_RECORDS, 5]
    read = list(with_locations(blocks))
    assert [row for row, _ in read] == rows  # without the nulls that a table fills in
    assert [where for _, where in read[:: 2 * BLOCK_RECORDS]] == [
        f"{source.path} row 1",
        f"{source.path} row {2 * BLOCK_RECORDS + 1}",
    ]
    assert sum(block.size for block in blocks) == pytest.approx(sources.hub_size(source), rel=0.01)
    assert [
        row["n"] for row, _ in with_locations(limit_records(sources.hub_blocks(source), BLOCK_RECORDS + 2))
    ] == list(range(BLOCK_RECORDS + 2))


def test_an_unknown_split_is_an_error(data_set):
    source, _ = data_set
    assert sources.hub_fingerprint(source) == sources.hub_fingerprint(source)
    with pytest.raises(sources.DataError, match=r"[Ss]plit"):
        list(sources.hub_blocks(source.model_copy(update={"split": "nothing"})))
