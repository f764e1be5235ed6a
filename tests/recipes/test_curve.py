"""The learning-rate curve in the terminal."""

import pytest

from nesso_tune.recipes.curve import BLOCKS, curve
from nesso_tune.recipes.plan import SchedulePlan


def heights(lines):
    """How full each column is, in eighths of a line."""
    rows = [line.split("|")[1] for line in lines if "|" in line]
    return [sum(BLOCKS.index(row[x]) for row in rows) for x in range(len(rows[0]))]


def test_it_rises_falls_and_stays():
    lines = curve(SchedulePlan("cosine", 1e-3, 1000, 100, 0.8, 0.5))
    columns = heights(lines)
    peak = columns.index(48)  # 6 lines of 8 eighths
    assert 5 <= peak <= 7
    assert columns[: peak + 1] == sorted(columns[: peak + 1])
    assert columns[peak:] == sorted(columns[peak:], reverse=True)
    assert columns[0] == 0
    assert set(columns[48:]) == {24}
    assert [line.split("|")[0].strip() for line in lines[:6]] == ["0.001", "", "", "0.0005", "", ""]
    assert lines[-1].split() == ["step", "0", "1000"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("steps", [1, 2, 59, 10**7])
def test_runs_of_any_length_are_drawn(steps):
    lines = curve(SchedulePlan("constant", 2e-5, steps, 0, 1.0, 0.0))
    assert set(heights(lines)) == {48}
    assert lines[-1].endswith(f" {steps}")
