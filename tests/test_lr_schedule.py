"""The learning-rate curve: values, shape, limits, and parity with a closed form written another way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.lr_schedule import DECAYING_TYPES, SCHEDULE_TYPES, _decay, lr_multiplier

NESSO = {"total_steps": 1000, "warmup_steps": 10, "constant_ratio": 0.8, "min_ratio": 0.1}


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 3000))
    ratio = draw(st.floats(0.01, 1.0))
    warmup = draw(st.integers(0, max(0, math.ceil(ratio * total) - 1)))
    return {
        "total_steps": total,
        "warmup_steps": warmup,
        "constant_ratio": ratio,
        "min_ratio": draw(st.floats(0.0, 1.0)),
        "shape": draw(st.sampled_from(["cosine", "linear"])),
    }


def values(schedule, steps=None):
    steps = range(schedule["total_steps"] + 2) if steps is None else steps
    return np.array([lr_multiplier(step, **schedule) for step in steps])


def closed_form(total_steps, warmup_steps, constant_ratio, min_ratio, shape="cosine"):
    """The same curve by interpolation: piecewise linear in the step, or in the angle of the cosine."""
    end = constant_ratio * total_steps
    steps = np.arange(total_steps + 2, dtype=np.float64)
    fall = np.interp(steps, [warmup_steps, end], [0.0, 1.0])
    if shape == "cosine":
        fall = np.sin(0.5 * np.pi * fall) ** 2
    decay = 1.0 + (min_ratio - 1.0) * fall
    return np.where(steps < warmup_steps, steps / max(1, warmup_steps), decay)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (1, 0.1), (10, 1.0), (405, 0.55), (800, 0.1), (999, 0.1)])
def test_the_constant_ratio_cosine_of_the_contract(step, expected):
    assert lr_multiplier(step, **NESSO) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(5, 0.5), (10, 1.0), (405, 0.55), (207, 0.7755696), (800, 0.1), (5000, 0.1)]
)
def test_linear_falls_in_a_straight_line(step, expected):
    assert lr_multiplier(step, **NESSO, shape="linear") == pytest.approx(expected, abs=1e-6)


def test_constant_stays_at_the_peak_after_the_warm_up():
    at = values({"total_steps": 100, "warmup_steps": 4, "shape": "constant"})
    assert at[:4].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert set(at[4:]) == {1.0}


def test_without_ratios_the_cosine_ends_at_zero_with_the_run():
    assert lr_multiplier(50, total_steps=100, warmup_steps=0) == pytest.approx(0.5)
    assert lr_multiplier(100, total_steps=100, warmup_steps=0) == 0.0


@given(schedules())
def test_parity_with_the_closed_form(schedule):
    np.testing.assert_allclose(values(schedule), closed_form(**schedule), atol=1e-9)


@given(schedules())
def test_it_stays_in_range_rises_then_falls(schedule):
    at, warmup = values(schedule), schedule["warmup_steps"]
    assert at.min() >= 0.0
    assert at.max() <= 1.0
    assert (np.diff(at[: warmup + 1]) >= 0).all()
    assert (np.diff(at[warmup:]) <= 1e-15).all()


@given(schedules())
def test_it_meets_its_boundaries(schedule):
    end = math.ceil(schedule["constant_ratio"] * schedule["total_steps"])
    assert lr_multiplier(schedule["warmup_steps"], **schedule) == pytest.approx(1.0)
    assert set(values(schedule, range(end, end + 50))) == {schedule["min_ratio"]}
    if schedule["warmup_steps"]:
        assert lr_multiplier(0, **schedule) == 0.0


@given(schedules())
def test_it_never_jumps(schedule):
    at, warmup = values(schedule), schedule["warmup_steps"]
    width = schedule["constant_ratio"] * schedule["total_steps"] - warmup
    steepest = (1.0 - schedule["min_ratio"]) * (math.pi / 2 if schedule["shape"] == "cosine" else 1.0) / width
    assert (np.abs(np.diff(at[: warmup + 1])) <= 1 / max(1, warmup) + 1e-9).all()
    assert (np.abs(np.diff(at[warmup:])) <= steepest + 1e-9).all()


BAD = {
    "no steps": ({"total_steps": 0}, "total_steps"),
    "negative warm-up": ({"warmup_steps": -1}, "warmup_steps"),
    "no decay": ({"constant_ratio": 0.0}, "constant_ratio"),
    "beyond the run": ({"constant_ratio": 1.01}, "constant_ratio"),
    "no number": ({"constant_ratio": math.nan}, "constant_ratio"),
    "negative floor": ({"min_ratio": -0.1}, "min_ratio"),
    "floor above the peak": ({"min_ratio": 1.1}, "min_ratio"),
    "an unknown shape": ({"shape": "cosin"}, "one of cosine, linear, constant, got 'cosin'"),
    "warm-up meets the floor": ({"warmup_steps": 800}, "800"),
    "warm-up fills the run": ({"warmup_steps": 1000, "shape": "constant"}, "1000"),
}


@pytest.mark.parametrize(("change", "word"), BAD.values(), ids=BAD)
def test_numbers_that_make_no_schedule_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        lr_multiplier(0, **NESSO | change)


def test_a_constant_schedule_may_warm_up_past_the_ratio():
    assert lr_multiplier(900, **NESSO | {"warmup_steps": 900, "shape": "constant"}) == 1.0


def test_a_type_without_a_decay_is_an_error_and_never_linear():
    assert [name for name in SCHEDULE_TYPES if name not in DECAYING_TYPES] == ["constant"]
    assert [_decay(0.25, name) for name in DECAYING_TYPES] == [pytest.approx(0.8535534), 0.75]
    for name in ("constant", "polynomial"):
        with pytest.raises(ValueError, match=f"'{name}' has no decay"):
            _decay(0.25, name)
