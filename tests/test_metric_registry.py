"""The registry of metrics, and its agreement with the documentation."""

import re
from pathlib import Path

from nesso_tune.metric_registry import ANSWER_METRICS, METRICS, PROGRESS_METRICS, VALIDATION_METRICS, charts, metric_of

DOCS = Path(__file__).parent.parent / "docs"


def test_every_metric_is_documented():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("metrics.md", "speed.md"))
    documented = set(re.findall(r"`([a-z_/]+)`", text))
    plain = {name.removeprefix("eval_") for name in METRICS}  # eval_... are the metrics of training, on validation rows
    assert sorted(plain - documented) == []


def test_what_can_select_weights():
    assert VALIDATION_METRICS == (
        "eval_loss", "eval_token_accuracy", "eval_rewards/accuracies", "eval_rewards/margins",
    )  # fmt: skip
    assert ANSWER_METRICS == (
        "stop_rate", "exact_match", "language_fidelity", "closer_to_chosen", "repetition_rate",
    )  # fmt: skip
    assert [name for name in METRICS if metric_of(name)] == [*VALIDATION_METRICS, *ANSWER_METRICS]
    assert [name for name, metric in METRICS.items() if metric.better == "lower"] == ["eval_loss", "repetition_rate"]
    assert metric_of("train_stop_rate/it") is METRICS["stop_rate"]


def test_charts_and_progress_lines_have_metrics_of_the_registry():
    shown = charts()
    names = [name.removesuffix("/source") for names in shown.values() for name in names]
    assert set(names) <= set(METRICS)
    assert shown["Loss"] == ("loss",)
    assert shown["Validation loss by source"] == ("eval_loss/source",)
    shift = shown["Chosen log-probability shift vs reference (nats/token)"]
    assert shift == ("logps/chosen_shift", "eval_logps/chosen_shift"), "one chart for both"
    assert {name.removeprefix("train_") for name in PROGRESS_METRICS} <= set(METRICS)
