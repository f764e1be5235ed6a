"""How much data there is, without preparing it."""

import json

import pytest

from nesso_tune import DataError, prepare_data
from nesso_tune.data.estimate import estimate_volume


def many(chats, times):
    return [row for _ in range(times) for row in chats]


def test_prepared_data_are_counted_exactly(sft, chats, write_rows):
    recipe = sft(write_rows(many(chats, 20)), validation_size=20)
    assert not estimate_volume(recipe).exact
    prepared = prepare_data(recipe)
    volume = estimate_volume(recipe)
    assert volume == prepared.volume
    assert (volume.exact, volume.rows, volume.validation_rows) == (True, len(prepared.train), 20)
    assert volume.tokens == prepared.summary.train.tokens


@pytest.mark.parametrize("packing", [True, False])
def test_an_estimate_is_near(sft, chats, write_rows, packing):
    recipe = sft(write_rows(many(chats, 200)), validation_size=0.1, packing=packing, sequence_len=1024)
    guess, truth = estimate_volume(recipe), prepare_data(recipe).volume
    assert not guess.exact
    assert guess.rows == pytest.approx(truth.rows, rel=0.03)
    assert guess.tokens == pytest.approx(truth.tokens, rel=0.02)
    assert guess.supervised_tokens == pytest.approx(truth.supervised_tokens, rel=0.02)
    assert guess.validation_rows == pytest.approx(truth.validation_rows, rel=0.02)


def test_weights_and_max_rows_count(sft, chats, write_rows):
    path = write_rows(many(chats, 100))
    plain = estimate_volume(sft(path, packing=False)).rows
    assert plain == 1000
    assert estimate_volume(sft({"path": path, "weight": 2.5}, packing=False)).rows == 2500
    assert estimate_volume(sft({"path": path, "max_rows": 30}, packing=False)).rows == 30


def test_a_file_whose_last_line_is_not_ended(sft, chats, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(chats[0]))
    assert estimate_volume(sft(str(path), packing=False)).rows == 1
    array = tmp_path / "some.json"
    array.write_text(json.dumps(chats))
    assert estimate_volume(sft(str(array), packing=False)).rows == 10


def test_pairs_and_validation_sources(dpo, duels, write_rows):
    held = {"path": write_rows(duels[:2], "held.jsonl")}
    volume = estimate_volume(dpo(write_rows(duels), validation_sources=[held]))
    assert (volume.rows, volume.validation_rows, volume.exact) == (6, 2, False)


def test_hub_data_that_is_not_known_is_left_open(sft):
    assert estimate_volume(sft("someone/never-fetched")) is None


def test_missing_files_are_named_with_their_keys(sft, chats, write_rows):
    held = {"path": "absent/held.jsonl"}
    for read in (estimate_volume, prepare_data):
        with pytest.raises(DataError) as caught:
            read(sft("absent/rows.jsonl", validation_sources=[{"path": write_rows(chats)}, held]))
        assert [(problem.where, problem.what) for problem in caught.value.problems] == [
            ("data.sources.0.path absent/rows.jsonl", "no such file"),
            ("data.validation_sources.1.path absent/held.jsonl", "no such file"),
        ]


def test_without_a_tokenizer_characters_are_counted(sft, dpo, chats, duels, write_rows):
    for recipe in (sft(write_rows(many(chats, 50))), dpo(write_rows(many(duels, 50), "duels.jsonl"))):
        raw = recipe.model_dump() | {"model": {"base": "someone/never-fetched"}}
        guess, truth = estimate_volume(type(recipe).model_validate(raw)), estimate_volume(recipe)
        assert guess.basis.endswith("the tokenizer is not available")
        assert truth.basis.startswith("from the first")
        assert guess.tokens == pytest.approx(truth.tokens, rel=0.5)  # their tokenizer is a tiny one
        assert guess.supervised_tokens == pytest.approx(truth.supervised_tokens, rel=0.5)
        if recipe.method == "dpo":
            assert guess.rows == truth.rows


def test_hub_data_whose_rows_are_stated(sft):
    source = {"path": "HuggingFaceTB/smoltalk", "subset": "all"}
    volume = estimate_volume(sft(source, sequence_len=4096, validation_size=1000))
    assert volume.tokens == pytest.approx(500 * 1_042_917, rel=1e-6)
    assert volume.rows == pytest.approx(volume.tokens / 4096, rel=0.02)
    assert "assumed" in volume.basis
    assert estimate_volume(sft({**source, "max_rows": 10, "weight": 2}, packing=False)).rows == 20
    assert estimate_volume(sft({**source, "subset": "other"})) is None
