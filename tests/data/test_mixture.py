"""What an epoch is made of: weights, rules per language, and target shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune import DataError, prepare_data
from nesso_tune.data.mixture import mixture_groups
from nesso_tune.data.packing import RowStream
from nesso_tune.recipes.sections import SFTData
from tests.support.examples import examples

from .test_packing import documents_of


def data_of(**keys):
    """A data section over two sources, the second with an alias."""
    sources = [{"path": "a.jsonl"}, {"path": "b.jsonl", "alias": "b"}]
    return SFTData.model_validate({"sources": sources, **keys})


def stream_of(documents, data, seed=1):
    every = np.arange(len(documents))
    return RowStream(documents, every, seed=seed, capacity=64, groups=mixture_groups(documents, every, data))


@examples(8)
@given(
    documents=st.integers(1500, 2500),
    longest=st.integers(2, 40),
    italian=st.floats(0.1, 0.9),
    there=st.floats(0.2, 0.8),
    seed=st.integers(0, 99),
)
def test_shares_are_kept_within_one_percent(tmp_path_factory, documents, longest, italian, there, seed):
    lengths = np.random.default_rng(seed).integers(1, longest, documents).tolist()
    languages = {i: "it" if i < there * documents else "en" for i in range(documents)}
    made = documents_of(tmp_path_factory.mktemp("m"), lengths, languages=languages)
    data = data_of(mixture={"by": "language", "shares": {"it": italian, "en": 1 - italian}})
    stream = stream_of(made, data, seed)
    for epoch in range(2):
        drawn = stream.epoch(epoch).records
        assert len(np.unique(drawn)) == len(drawn)  # nothing is repeated unless it is asked for
        spoken = made.lengths[[i for i in drawn if languages[int(i)] == "it"]].sum()
        assert abs(spoken / made.lengths[drawn].sum() - italian) < 0.01


def test_the_scarcest_group_is_seen_whole_and_others_are_drawn_afresh(tmp_path):
    documents = documents_of(tmp_path / "m", [4] * 100, languages={i: "it" if i < 20 else "en" for i in range(100)})
    stream = stream_of(documents, data_of(mixture={"by": "language", "shares": {"it": 0.5, "en": 0.5}}))
    first, second = (set(stream.epoch(e).records.tolist()) for e in (0, 1))
    assert {i for i in first if i < 20} == set(range(20)) == {i for i in second if i < 20}
    assert len({i for i in first if i >= 20}) == 20 == len({i for i in second if i >= 20})
    assert first != second


def test_scarce_groups_may_be_repeated(tmp_path):
    documents = documents_of(tmp_path / "m", [4] * 100, languages={i: "it" if i < 20 else "en" for i in range(100)})
    mixture = {"by": "language", "shares": {"it": 0.5, "en": 0.5}, "repeat": 3.0}
    drawn = stream_of(documents, data_of(mixture=mixture)).epoch(0).records
    counts = np.bincount(drawn, minlength=100)
    assert set(counts[:20]) == {3}
    assert counts[20:].sum() == 60


def test_shares_by_source_and_of_all_others(tmp_path):
    documents = documents_of(tmp_path / "m", [4] * 90, sources={i: int(i >= 30) for i in range(90)})
    shares = {"b": 0.25, "other": 0.75}
    drawn = stream_of(documents, data_of(mixture={"by": "source", "shares": shares})).epoch(0).records
    assert (drawn < 30).sum() == 30
    assert (drawn >= 30).sum() == 10
    nothing = {"a.jsonl": 1.0, "b": 0.0}
    assert stream_of(documents, data_of(mixture={"by": "source", "shares": nothing})).epoch(0).records.max() < 30


def test_shares_name_all_that_is_there_and_nothing_else(tmp_path):
    documents = documents_of(tmp_path / "m", [4] * 9, languages={0: "de"})
    every = np.arange(9)
    with pytest.raises(DataError, match=r"has no share for de; set a share for each \(0 leaves it out\)"):
        mixture_groups(documents, every, data_of(mixture={"by": "language", "shares": {"it": 1.0}}))
    with pytest.raises(DataError, match="no row belongs to `en`; remove it"):
        mixture_groups(
            documents, every, data_of(mixture={"by": "language", "shares": {"it": 0.5, "en": 0.4, "de": 0.1}})
        )


def test_a_weight_or_share_above_zero_gives_a_row_and_it_is_said(sft, write_rows):
    ten = [{"prompt": f"Domanda {i}?", "response": "Sì.", "lang": "it"} for i in range(10)]
    rare = [{"prompt": f"Question {i}?", "response": "Yes.", "lang": "en"} for i in range(3)]
    few, many = write_rows(ten, "few.jsonl"), write_rows([*ten, *rare], "many.jsonl")
    rules = {"en": {"weight": 0.1}, "fr": {"weight": 2.0}}
    data = prepare_data(sft({"path": few, "weight": 0.04}, {"path": many, "rules": rules}, validation_size=0))
    for epoch in range(3):
        drawn = data.stream.epoch(epoch).records
        assert ((drawn < 10).sum(), (drawn >= 10).sum()) == (1, 11)
    said = data.summary.warnings
    assert "data.sources.0.weight selects less than 1 of 10 rows" in said[0 if len(said) == 3 else 1]
    assert "data.sources.1.rules.en.weight selects less than 1 of 3 rows" in " ".join(said)
    assert said[-1] == "data.sources.1.rules.fr.weight has no effect: no row is in `fr`"
    shares = {"by": "language", "shares": {"it": 0.9999, "en": 0.0001}}
    data = prepare_data(sft(many, mixture=shares, validation_size=0.01))
    assert sorted(group.rows for group in data.summary.mixture)[0] == 1
    assert "data.mixture.shares.en selects less than 1 of 3 rows" in " ".join(data.summary.warnings)


def test_a_source_or_a_validation_share_that_gives_nothing_is_said(sft, write_rows):
    good = write_rows([{"prompt": f"Domanda {i}?", "response": "Sì."} for i in range(9)], "good.jsonl")
    bad = write_rows([{"prompt": "Domanda?", "response": ""}], "bad.jsonl")
    said = prepare_data(sft(good, bad, validation_size=0.01)).summary.warnings
    assert list(said) == [
        "data.sources.1 has no training rows: check the dropped rows, or remove the source",
        "data.validation_size 0.01 of 9 rows is less than one row: nothing is held out or evaluated; raise it",
    ]


SCORED = [
    {"prompt": f"Domanda {i}?", "response": f"Risposta {i}.", "score": 0.1 * i, "lang": lang}
    for i in range(10)
    for lang in ("it", "en", "fr")
]


def test_rules_hold_for_one_language(sft, write_rows):
    rules = {"en": {"min_score": 0.55}, "other": {"keep": False}, "it": {"weight": 2.0}}
    source = {"path": write_rows(SCORED), "score_field": "score", "rules": rules}
    report = prepare_data(sft(source)).report
    assert report["dropped"] == {"language_not_kept": 10, "below_min_score": 6}
    assert {code: of["rows"] for code, of in report["languages"].items()} == {"it": 10, "en": 4}
    assert report["train"]["rows"] == 24
    assert {group["name"].split()[-1]: group["rows"] for group in report["mixture"]} == {"it": 20, "en": 4}


def test_the_mixture_is_reported_and_only_arranges(sft, write_rows):
    path = write_rows(SCORED)
    plain = prepare_data(sft(path)).report
    mixed = prepare_data(sft(path, mixture={"by": "language", "shares": {"it": 0.5, "other": 0.5}})).report
    assert mixed["cache_hit"]  # what is encoded is the same
    assert mixed["fingerprint"] != plain["fingerprint"]
    shares = {group["name"]: group["share_of_tokens"] for group in mixed["mixture"]}
    assert shares == {"it": pytest.approx(0.5, abs=0.05), "other": pytest.approx(0.5, abs=0.05)}
    assert sum(group["rows"] for group in mixed["mixture"]) == mixed["train"]["rows"]
