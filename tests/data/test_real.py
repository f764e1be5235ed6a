"""Real data of many shapes, where it is at hand: ../shared beside the repository."""

from pathlib import Path

import pytest

from nesso_tune import DataError, prepare_data

SHARED = Path(__file__).parents[3] / "shared"


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return str(path)


def test_twelve_thousand_conversations_are_packed_full(sft):
    data = prepare_data(sft(shared("bench/sft.jsonl"), sequence_len=4096, validation_size=100))
    report = data.report
    assert report["rows_read"] == 11_997 == report["rows_kept"] + sum(report["dropped"].values())
    assert report["rows_kept"] > 11_900
    assert report["packing"]["fill"] >= 0.98
    assert report["languages"].keys() == {"it", "en"}
    assert report["validation"]["rows"] == 100
    lengths = [sum(row["seq_lengths"]) for row in data.train]
    assert sum(lengths) == report["train"]["tokens"]
    assert max(lengths) <= 4096


def test_preference_pairs(dpo):
    report = prepare_data(dpo(shared("bench/pref.jsonl"), sequence_len=8192)).report
    assert report["rows_read"] == 900 == report["rows_kept"] + sum(report["dropped"].values())
    assert report["rows_kept"] > 850, report["dropped"]
    assert report["languages"].keys() == {"it", "en"}


SHAPES = {
    "alpaca, detected": ("data/sft_en.jsonl", {"language": "en"}, 3600),
    "another answer column": ("data/sft_en.jsonl", {"format": "alpaca", "response_field": "response"}, 1900),
    "two plain columns": ("data/sft_it.jsonl", {"prompt_field": "eng", "response_field": "ita", "format": "alpaca",
                                               "language": "it"}, 1000),
    "sharegpt": ("data/sft_multiturn.jsonl", {"format": "sharegpt"}, 450),
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "least"), SHAPES.values(), ids=SHAPES)
def test_odd_shapes_load_by_naming_their_columns(sft, tmp_path, name, keys, least):
    lines = Path(shared(name)).read_text().splitlines(keepends=True)
    told_by = keys.get("prompt_field") or keys.get("response_field")
    wanted = told_by or ("from" if keys.get("format") == "sharegpt" else "")
    path = tmp_path / "rows.jsonl"  # rows of one shape first: the first rows decide
    path.write_text("".join(sorted(lines, key=lambda line: f'"{wanted}": ' not in line)))
    report = prepare_data(sft({"path": str(path), **keys}, sequence_len=2048)).report
    assert report["rows_kept"] >= least
    assert report["rows_read"] == len(lines) == report["rows_kept"] + sum(report["dropped"].values())


def test_sharegpt_pairs(dpo):
    source = {"path": shared("data/pref_en.jsonl"), "format": "preference"}
    report = prepare_data(dpo(source, sequence_len=8192)).report
    assert report["rows_kept"] >= 290  # of the 300 that have chosen and rejected
    assert report["dropped"]["missing_field"] == 900


def test_shapes_that_need_a_mapping_say_so(sft, dpo):
    with pytest.raises(DataError, match=r"its format is not recognised \(its columns are .*premise"):
        prepare_data(dpo(shared("data/pref_it.jsonl")))
    with pytest.raises(DataError, match=r"not recognised|no column|can be used"):
        prepare_data(sft({"path": shared("data/sft_it.jsonl"), "max_rows": 20}))


def test_dialogues_with_tools(sft, tmp_path):
    lines = Path(shared("data/toolcall.jsonl")).read_text().splitlines(keepends=True)
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(line for line in lines if '"_source": "glaive' in line))
    data = prepare_data(sft(str(path), sequence_len=4096))
    assert data.report["rows_read"] == 300 == data.report["rows_kept"] + sum(data.report["dropped"].values())
    assert data.report["rows_kept"] >= 295, data.report["dropped"]
    learned = [label for row in data.train for label in row["labels"] if label != -100]
    text = data.tokenizer.decode(learned)
    assert text.count("<tool_call>") == text.count("</tool_call>") > 100
    assert "<tool_response>" not in text
    assert "<tools>" not in text
