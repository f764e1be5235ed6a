"""The arithmetic of a run."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nesso_tune.errors import RecipeError
from nesso_tune.planning.plan import BAR_CHARACTERS, DataVolume, SchedulePlan, World, curve
from nesso_tune.planning.planner import make_plan
from nesso_tune.planning.shapes import known_config, shape_of
from nesso_tune.recipes import load_recipe
from tests.support.recipe_texts import DPO, SFT, read

ZAGREUS = shape_of(known_config("mii-llm/zagreus-0.4B-ita"))


def plan(keys="", rows=None, processes=1, text=SFT, shape=None, **volume):
    """The plan of a small recipe with keys of `train`."""
    data = None if rows is None else DataVolume(rows, rows * 100, rows * 50, **volume)
    return make_plan(read(f"{text}train: {{{keys}}}\n"), World(processes), data, shape)


def test_devices_are_a_world():
    with pytest.raises(RecipeError, match=r"world: must be of class World, not int; write world=World\(8\)"):
        make_plan("quickstart/sft", 8)


def test_the_reference_run_of_32_devices():
    of = make_plan(load_recipe("sft"), World(32), DataVolume(100_000, 400_000_000, 200_000_000, 10_000))
    assert (of.micro_batch, of.accumulation, of.processes, of.global_batch) == (1, 8, 32, 256)
    assert of.total_steps == math.ceil(3 * 100_000 / 256) == 1172
    assert (of.schedule.warmup_steps, of.schedule.decay_end) == (36, 938)
    assert of.schedule.in_words() == (
        "warm-up over 36 steps to 0.001, cosine to step 938, then constant 0.0003 to step 1172"
    )
    assert of.advice == ()


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 64), (8, 8), (32, 2), (64, 1)])
def test_accumulation_follows_from_the_global_batch(processes, accumulation):
    of = plan("global_batch_size: 128, micro_batch_size: 2", processes=processes)
    assert (of.accumulation, of.global_batch) == (accumulation, 128)


@pytest.mark.parametrize(
    ("batch", "processes", "remedy"),
    [(100, 8, "set it to 96 or 112"), (8, 8, "set it to 16"), (129, 1, "set it to 128 or 130")],
)
def test_a_global_batch_that_does_not_divide_is_refused_with_the_next_ones(batch, processes, remedy):
    with pytest.raises(RecipeError, match=rf"train.global_batch_size: {batch} is not a multiple .*{remedy}$"):
        plan(f"global_batch_size: {batch}, micro_batch_size: 2", processes=processes)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (3, 100, 10, 30),
        (3, 101, 10, 31),
        (1, 1, 10, 1),
        (0.5, 100, 10, 5),
        (0.001, 100, 10, 1),
        (2.9, 10, 1, 29),
        (1.1, 30, 3, 11),
    ],
)
def test_steps_are_rounded_up(epochs, rows, batch, steps):
    assert plan(f"num_epochs: {epochs}, global_batch_size: {batch}", rows).total_steps == steps


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "trained"),
    [(1, 10, 64, 6.4), (3, 62, 64, 3.0968), (3, 31, 64, 4.129), (2, 100, 10, 2.0)],
)
def test_epochs_are_those_of_whole_steps(epochs, rows, batch, trained):
    of = plan(f"num_epochs: {epochs}, global_batch_size: {batch}", rows)
    assert of.epochs == of.total_steps * batch / rows == pytest.approx(trained, rel=1e-4)
    said = f"{epochs} epoch(s) of {rows} rows are rounded up to {trained:.3g} by "
    assert (said in " / ".join(of.advice)) == (trained > 1.1 * epochs)


@pytest.mark.parametrize(
    ("steps", "words"), [(900, "train.max_steps: 900 are 45 epochs, the default is 3"), (240, ""), (9, "")]
)
def test_max_steps_far_from_the_data(steps, words):
    said = [text for text in plan(f"max_steps: {steps}, global_batch_size: 10", 200).advice if "max_steps" in text]
    assert [text.startswith(words) for text in said] == [True] * bool(words)


def test_a_loss_that_sorts_the_pairs_of_a_step_is_of_one_process():
    text = DPO + "dpo: {loss: {sigmoid: 1.0, aot: 0.5}}\n"
    assert plan("micro_batch_size: 8", text=text).global_batch == 8
    said = r"dpo\.loss: aot sorts all pairs of a step, which are split over 2 processes; start a single process"
    with pytest.raises(RecipeError, match=said):
        plan("micro_batch_size: 8", text=text, processes=2)


def test_max_steps_decide_and_the_epochs_follow():
    of = plan("max_steps: 30, global_batch_size: 10", 200)
    assert (of.total_steps, of.epochs) == (30, 1.5)
    assert plan("max_steps: 30").epochs is None
    assert plan("max_steps: 30").schedule.total_steps == 30


def test_without_a_volume_the_steps_stay_open():
    of = plan("num_epochs: 2")
    assert (of.total_steps, of.schedule, of.save_every, of.log_every, of.epochs) == (None, None, None, 10, 2.0)


def test_intervals_are_steps_or_a_share_of_the_run():
    text = SFT + "checkpoint: {every_steps: 0.25}\nevaluation: {every_steps: 7}\nlogging: {every_steps: 0.001}\n"
    of = plan("max_steps: 100", text=text)
    assert (of.save_every, of.evaluate_every, of.log_every) == (25, 7, 1)
    assert plan("max_steps: 100", text=SFT + "evaluation: null\n").evaluate_every is None


WORDS = {
    "constant": ("type: constant, warmup_steps: 5", "warm-up over 5 steps to 0.5, constant 0.5 to step 100"),
    "whole cosine": ("warmup_steps: 0", "cosine to 0 at step 100"),
    "linear with a floor": ("type: linear, min_ratio: 0.1, warmup_ratio: 0", "linear to 0.05 at step 100"),
    "constant ratio": (
        "constant_ratio: 0.7, min_ratio: 0.1, warmup_steps: 0",
        "cosine to step 70, then constant 0.05 to step 100",
    ),
    "inexact share": (
        "constant_ratio: 0.07, warmup_steps: 0, min_ratio: 0",
        "cosine to step 7, then constant 0 to step 100",
    ),
    "default warm-up": ("type: linear", "warm-up over 3 steps to 0.5, linear to 0 at step 100"),
}


@pytest.mark.parametrize(("schedule", "words"), WORDS.values(), ids=WORDS)
def test_the_schedule_in_words(schedule, words):
    assert plan(f"max_steps: 100, learning_rate: 0.5, schedule: {{{schedule}}}").schedule.in_words() == words


def test_a_warm_up_too_long_is_refused():
    with pytest.raises(
        RecipeError, match=r"train.schedule: the warm-up of 80 steps does not end before step 80.*train longer"
    ):
        plan("max_steps: 100, schedule: {warmup_steps: 80, constant_ratio: 0.8, min_ratio: 0}")
    assert (
        plan("max_steps: 100, schedule: {warmup_steps: 79, constant_ratio: 0.8, min_ratio: 0}").schedule.warmup_steps
        == 79
    )


@given(st.integers(1, 40), st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 0.99), st.floats(0.01, 1.0))
def test_runs_of_a_few_steps_have_a_schedule(steps, kind, warmup, end):
    ratio = "" if kind == "constant" or warmup >= end else f", constant_ratio: {end!r}, min_ratio: 0"
    of = plan(f"max_steps: {steps}, schedule: {{type: {kind}, warmup_ratio: {warmup!r}{ratio}}}")
    values = [of.schedule.multiplier(step) for step in range(steps + 1)]
    assert max(values) == 1.0
    assert values.index(1.0) == of.schedule.warmup_steps < steps


def test_one_step_trains_at_the_peak():
    of = plan("num_epochs: 1", 1)
    assert of.total_steps == of.save_every == of.evaluate_every == 1
    assert of.schedule.multiplier(0) == 1.0


def test_the_multiplier_is_the_public_curve():
    schedule = SchedulePlan("cosine", 1e-3, 1000, 10, 0.8, 0.1)
    assert [schedule.multiplier(step) for step in (0, 1, 10, 405, 800, 999)] == pytest.approx(
        [0, 0.1, 1, 0.55, 0.1, 0.1]
    )


def resized(**sizes):
    return shape_of(known_config("mii-llm/zagreus-0.4B-ita") | sizes)


def test_auto_takes_the_rate_of_models_of_this_size():
    assert plan("", text=SFT).learning_rate == 2e-5  # a base of unknown size
    assert plan("", text=DPO).learning_rate == 1e-6
    assert plan("", shape=ZAGREUS).learning_rate == pytest.approx(1e-3, rel=0.05)
    assert plan("", text=DPO, shape=ZAGREUS).learning_rate == pytest.approx(1e-6, rel=0.05)
    sizes = [resized(num_hidden_layers=layers) for layers in (1, 32, 100, 400, 4000)]
    rates = [plan("", shape=shape).learning_rate for shape in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 1e-5
    assert plan("learning_rate: 3.0e-4", shape=ZAGREUS).learning_rate == 3e-4


def advice(*arguments, **keys):
    return " / ".join(plan(*arguments, **keys).advice)


def test_advice_for_a_batch_far_from_the_tuned_one():
    small = advice("learning_rate: 1.0e-3, global_batch_size: 8", shape=ZAGREUS)
    assert "tuned for 1,048,576 tokens per step" in small
    assert (
        "this run has 8 rows, 32,768 tokens: consider 1.8e-04, or train.global_batch_size: 256" in small
    )  # the square root of the batch
    assert advice("learning_rate: 1.0e-3, global_batch_size: 256", shape=ZAGREUS) == ""
    assert advice("learning_rate: 1.0e-4, global_batch_size: 8", shape=ZAGREUS) == ""  # someone chose another rate


def test_advice_on_data_and_context():
    text = SFT.replace("data:", "data:\n  packing: false")
    assert "one epoch (5 rows) is smaller than one global batch (8)" in advice("global_batch_size: 8", 5)
    assert advice("global_batch_size: 8", 80, validation_rows=80) == ""
    assert "more validation rows" in advice("", 50, validation_rows=51, text=text)
    assert advice("", 50, validation_rows=51) == ""  # packed rows say nothing about conversations
    long = SFT.replace("data:", "data:\n  sequence_len: 8192")
    assert "exceeds the base model's context length of 4096" in advice("learning_rate: 0.1", shape=ZAGREUS, text=long)


def test_sizes_on_disk():
    of = plan("", shape=ZAGREUS)
    assert (of.parameters, of.checkpoint_bytes, of.final_bytes) == (
        ZAGREUS.parameters,
        12 * of.parameters,
        2 * of.parameters,
    )
    adapted = SFT.replace("base: b", "base: b, dtype: float32, adapter: {}")
    assert plan("", shape=ZAGREUS, text=adapted).checkpoint_bytes == 12 * 32 * 16 * 16960, "what is trained"
    assert plan("", shape=ZAGREUS, text=adapted).final_bytes == 4 * ZAGREUS.parameters


@given(
    st.integers(1, 10**9), st.integers(1, 10**9), st.floats(1e-3, 1e5), st.integers(0, 10**12), st.integers(1, 10**5)
)
def test_no_size_is_too_odd(micro, accumulation, epochs, rows, processes):
    of = plan(
        f"micro_batch_size: {micro}, gradient_accumulation_steps: {accumulation}, num_epochs: {epochs!r}",
        rows,
        processes,
    )
    assert of.total_steps * of.global_batch >= epochs * rows - 1e-3 * max(1.0, rows * 1e-6)
    assert json.loads(json.dumps(of.to_dict()))["total_steps"] == of.total_steps


def test_without_data_the_schedule_is_said_in_shares_of_the_run():
    plan = make_plan(load_recipe("sft"))
    assert (plan.total_steps, plan.schedule) == (None, None)
    assert plan.to_dict()["schedule_in_words"] == (
        "warm-up over 3 % to 0.001, cosine to 80 % of the run, then constant 0.0003 to 100 % of the run"
    )


def heights(lines):
    """How full each column is, in eighths of a line."""
    rows = [line.split("|")[1] for line in lines if "|" in line]
    return [sum(BAR_CHARACTERS.index(row[x]) for row in rows) for x in range(len(rows[0]))]


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
