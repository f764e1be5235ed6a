"""Runs compared: which are one variant, and what the spread between their seeds says of a difference."""

import json
import math
import re
from itertools import count

import numpy as np
import pytest

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.reports.charts import comparison_charts
from nesso_tune.reports.comparison import Comparison, difference, two_sided_p, write_comparison
from nesso_tune.reports.html import plotly_library
from tests.support.run_directories import write_run

LOW, HIGH = {"train": {"learning_rate": 0.001}}, {"train": {"learning_rate": 0.1}}


@pytest.fixture
def make(tmp_path):
    """Writes a finished run whose last `eval_loss` is given."""
    numbers = count()

    def write(loss, recipe=LOW, *, lines=(), state="finished", salt="0", **more):
        own = [{"step": 1, "eval_loss": loss}, *lines]
        return write_run(tmp_path / f"run-{next(numbers)}", own, recipe={**recipe, **more}, state=state, salt=salt)

    return write


def seeds(make, recipe, *losses):
    return [make(loss, recipe, seed=i) for i, loss in enumerate(losses, 1)]


# Statistics


def integral_of_t(t, freedom):
    """Probability beyond ± t, by integrating Student's density."""
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    return 1 - 2 * scale * np.trapezoid(density, x)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 13, 40])
def test_p_is_that_of_students_distribution(freedom):
    for t in (0.0, 0.3, 1.0, 2.5, 7.0):
        assert two_sided_p(t, freedom) == pytest.approx(integral_of_t(t, freedom), abs=1e-9)


@pytest.mark.parametrize(("freedom", "critical"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042)])
def test_p_at_the_critical_values_of_the_table(freedom, critical):
    assert two_sided_p(critical, freedom) == pytest.approx(0.05, abs=1e-4)


def test_mean_spread_and_standard_error_are_those_of_numpy(make):
    a, b = np.array([1.0, 1.2, 1.1]), np.array([1.5, 1.9])
    one, other = Comparison.read([*seeds(make, LOW, *a), *seeds(make, HIGH, *b)]).variants
    assert one.sample("eval_loss").mean == pytest.approx(a.mean())
    assert one.sample("eval_loss").spread == pytest.approx(a.std(ddof=1))
    found = difference("eval_loss", one, other)
    pooled = math.sqrt((a.var(ddof=1) * 2 + b.var(ddof=1) * 1) / 3)
    assert found.amount == pytest.approx(b.mean() - a.mean())
    assert found.stderr == pytest.approx(pooled * math.sqrt(1 / 3 + 1 / 2))
    assert found.p == pytest.approx(integral_of_t(found.amount / found.stderr, 3), abs=1e-9)
    assert found.seeds == (3, 2)


def test_equal_variants_are_told_apart_as_rarely_as_promised(make):
    """Also if the best of four is picked: simulated from samples of the same distribution."""
    rng, trials, wrong = np.random.default_rng(7), 300, 0
    variants = [seeds(make, {"train": {"learning_rate": i}}, 0, 0, 0) for i in range(4)]
    compared = Comparison.read([run for runs in variants for run in runs])
    for _ in range(trials):
        for variant in compared.variants:
            for run in variant.runs:
                run.record.lines[:] = [{"step": 1, "eval_loss": rng.normal()}]
        wrong += any(each.told_apart for each in compared.differences("eval_loss"))
    assert wrong / trials < 0.08


# Variants


def test_runs_that_differ_in_their_seed_alone_are_one_variant(make):
    runs = [*seeds(make, LOW, 1.0, 1.1), *seeds(make, HIGH, 2.0, 2.1)]
    compared = Comparison.read(runs)
    assert [each.name for each in compared.variants] == ["learning_rate=0.001", "learning_rate=0.1"]
    assert [len(each.runs) for each in compared.variants] == [2, 2]
    assert compared.differing == ("train.learning_rate",)
    assert compared.lines() == [
        "2 variants, 4 runs; they differ in train.learning_rate",
        "variant              seeds  eval_loss",
        "learning_rate=0.001  2      1.05 ± 0.071",
        "learning_rate=0.1    2      2.05 ± 0.071",
        "(mean ± standard deviation between seeds)",
        "eval_loss: learning_rate=0.001 is better than learning_rate=0.1 by 1 ± 0.071 (standard error; 2 seeds and "
        "2 seeds; p = 0.005): more than the spread between seeds explains",
    ]


def test_a_difference_within_the_spread_is_none(make):
    runs = [*seeds(make, LOW, 1.0, 1.4, 1.2), *seeds(make, HIGH, 1.1, 1.5, 1.3)]
    (verdict,) = Comparison.read(runs).verdicts()
    assert verdict.startswith("eval_loss: learning_rate=0.001 and learning_rate=0.1 cannot be told apart: ")
    assert "differ by 0.1 ± 0.16 (standard error; 3 seeds and 3 seeds; p = 0.57)" in verdict


def test_with_one_seed_each_the_spread_is_not_known(make):
    (verdict,) = Comparison.read([make(1.0), make(1.5, HIGH)]).verdicts()
    assert verdict.startswith("eval_loss: run-0 is better than run-1 by 0.5; with one seed each the spread")
    assert Comparison.read([make(1.0), make(1.0, HIGH)]).verdicts() == [
        "eval_loss: run-2 and run-3 have the same value (one seed each)"
    ]


def test_one_variant_has_no_verdict(make):
    compared = Comparison.read(seeds(make, LOW, 1.0, 2.0, 3.0))
    assert compared.lines() == [
        "1 variant, 3 runs",
        "variant           seeds  eval_loss",
        "run-0 and 2 more  3      2 ± 1",
        "(mean ± standard deviation between seeds)",
    ]


def test_runs_that_would_falsify_a_mean_are_left_out(make):
    early = {"step": 1, "event": "early_stopped", "by": "callback"}
    runs = [make(1.0, seed=1), make(1.0, seed=1), make(9.0, seed=2, state="failed"), make(5.0, seed=3, lines=[early])]
    compared = Comparison.read([*runs, make(2.0, HIGH)])
    assert compared.variants[0].sample("eval_loss").values == (1.0,)
    (note,) = compared.notes
    assert note == (
        "not in the means: run-1 (same seed as run-0), run-2 (not finished), run-3 (ended early by a callback)"
    )
    assert Comparison.read([runs[2], make(1.0, HIGH)]).verdicts()[0] == (
        "eval_loss: fewer than two variants have a finished run with it"
    )


def test_a_run_that_lost_its_metrics_does_not_replace_another_one(make):
    lost, whole = make(1.0, seed=1), make(2.0, seed=1)
    (lost / "metrics.jsonl").write_text("")
    compared = Comparison.read([lost, whole])
    assert compared.variants[0].sample("eval_loss").values == (2.0,)
    assert compared.notes == ("not in the means: run-0 (no metrics)",)
    head, *rest = compared.lines()
    assert head == "1 variant, 2 runs"
    assert "(mean ± standard deviation between seeds)" not in rest, "there is one value"


def test_many_keys_that_differ_are_counted_on_a_terminal(make):
    runs = [make(value, {"train": {f"key_{i}": value for i in range(9)}}) for value in (1.0, 2.0)]
    head = Comparison.read(runs).lines()[0]
    assert head.startswith("2 variants, 2 runs; they differ in train.key_0, ")
    assert head.endswith(", train.key_5 and 3 more")


def test_the_value_is_that_of_the_weights_in_final(make):
    lines = [{"step": 2, "eval_loss": 7.0}, {"step": 2, "event": "best", "taken": 1}]
    compared = Comparison.read([make(1.0, lines=lines), make(2.0, HIGH, lines=lines[:1])])
    assert [each.sample("eval_loss").values for each in compared.variants] == [(1.0,), (7.0,)]


def test_dpo_is_compared_by_reward_accuracy_and_by_language(make):
    name = "eval_rewards/accuracies"
    runs = []
    for value, beta in ((0.6, 0.1), (0.9, 0.5)):
        lines = [{"step": 2, name: value, f"{name}/it": value - 0.1}]
        runs.append(make(1.0, {"method": "dpo", "dpo": {"beta": beta}}, lines=lines))
    compared = Comparison.read(runs)
    assert compared.metrics == (name, f"{name}/it")
    assert compared.differences(name)[0].better == "run-1"
    assert Comparison.read([*runs, make(1.0)]).notes[0].startswith("the runs have different methods")
    assert Comparison.read(runs, "eval_loss").metrics == ("eval_loss",)


def test_other_data_can_have_other_validation_rows(make):
    other = {**LOW, "data": {"sources": [{"path": "b"}]}}
    (_, note) = Comparison.read([make(1.0, {**LOW, "data": {"sources": [{"path": "a"}]}}), make(2.0, other)]).verdicts()
    assert note == "the variants differ in data.sources.0.path: their validation rows may not be the same"


def test_the_salt_of_a_private_value_makes_no_variant(make):
    runs = []
    for path, digest in (("/secret/a", "0" * 16), ("/secret/a", "1" * 16), ("/secret/b", "2" * 16)):
        hidden = {"data": {"sources": [{"path": f"private source 1 #{digest}"}]}}
        runs.append(make(1.0, hidden, seed=len(runs)))
        open_recipe = {"data": {"sources": [{"path": path}]}, "method": "sft", "seed": len(runs)}
        (runs[-1] / "recipe.yaml").write_text(json.dumps(open_recipe))
    compared = Comparison.read(runs)
    assert [len(each.runs) for each in compared.variants] == [2, 1]
    assert "secret" not in "".join(compared.lines())
    (runs[0] / "recipe.yaml").unlink()
    assert len(Comparison.read(runs[:2]).variants) == 2, "not known to be the same"


# The page


def own(page):
    return page.replace(plotly_library().decode(), "")


def test_the_page(make, tmp_path):
    lines = [{"step": 1, "eval_loss/it": 3.0, "stop_rate": 0.5}]
    runs = [make(loss, rate, seed=seed, lines=lines) for rate, loss in ((LOW, 1.0), (HIGH, 9.0)) for seed in (1, 2)]
    write_comparison(runs, tmp_path / "c.html")
    page = own((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "<h1>4 runs, 2 variants</h1>" in page
    differences = page[page.index("Differences of the recipes") : page.index("<h2>Runs")]
    assert re.findall(r"<code>(.*?)</code>", differences) == ["train.learning_rate"]
    assert "<td>0.001</td><td>0.1</td>" in differences
    assert "<strong>1 ± 0 (best)</strong>" in page
    assert "eval_loss/it: learning_rate=0.001 and learning_rate=0.1 cannot be told apart" in page
    row = page[page.index('<td class="key">eval_loss</td>') :].split("</tr>")[0]
    assert row.index("(best)") < row.index(">9<")
    assert not re.search(r"https?://|src=|@import", page), "no external resources"


def test_a_folder_that_is_no_run_is_an_error(make, tmp_path):
    with pytest.raises(RunEnvironmentError, match="is not a run directory; name the output_dir"):
        write_comparison([make(1.0), tmp_path], tmp_path / "c.html")


def test_runs_share_one_chart_per_metric_and_seeds_a_colour():
    lines = [{"step": 1, "loss": 1.0, "loss/it": 2.0}]
    charts = comparison_charts({"a": lines, "b": lines, "c": lines}, {"a": (0, 0), "b": (0, 1), "c": (1, 0)})
    (loss,) = [chart for chart in charts if chart.title == "Loss"]
    looks = [(series.name, series.colour, series.dash) for series in loss.series]
    assert looks == [("a", 0, 0), ("b", 0, 1), ("c", 1, 0)]
