"""Holding out: exact, in proportion to the languages, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune import RecipeError
from nesso_tune.data.split import hold_out
from tests.support.examples import examples


@examples(100)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=200), st.data())
def test_rows_are_split_exactly_and_in_proportion(languages, data):
    languages = np.array(languages)
    size = data.draw(st.integers(1, len(languages) - 1))
    train, held = hold_out(languages, size, seed=1)
    assert len(held) == size
    assert sorted([*train, *held]) == list(range(len(languages)))
    for code in range(4):
        share = size * (languages == code).mean()
        assert abs((languages[held] == code).sum() - share) < 1


def test_a_share_holds_out_a_row_of_every_language_that_has_ten():
    languages = np.array([0] * 1000 + [1] * 10 + [2] * 9)
    _, held = hold_out(languages, 0.05, seed=1)
    assert np.bincount(languages[held], minlength=3).tolist() == [50, 1, 0]


def test_the_seed_decides():
    languages = np.zeros(100, dtype=int)
    assert hold_out(languages, 10, 1)[1].tolist() == hold_out(languages, 10, 1)[1].tolist()
    assert hold_out(languages, 10, 1)[1].tolist() != hold_out(languages, 10, 2)[1].tolist()


@pytest.mark.parametrize("size", [0, 0.01])
def test_nothing_is_held_out_of_little(size):
    train, held = hold_out(np.zeros(5, dtype=int), size, 1)
    assert (train.tolist(), held.tolist()) == ([0, 1, 2, 3, 4], [])


@pytest.mark.parametrize("size", [5, 10_000])
def test_holding_out_everything_is_an_error(size):
    with pytest.raises(RecipeError, match=r"validation_size: .* of 5 usable rows leave nothing to train on; .*e.g. 1"):
        hold_out(np.zeros(5, dtype=int), size, 1)
