"""The registry of metrics, and its agreement with the documentation."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from nesso_tune import RecipeError, answer_metric, load_recipe, metric_registry
from nesso_tune.evaluation.chat import parse_row, score
from nesso_tune.evaluation.gate import Gate, decide
from nesso_tune.evaluation.results import ModelResult
from nesso_tune.generation.answers import Answer, Prompt, answer_metrics
from nesso_tune.metric_registry import (
    ANSWER_METRICS,
    METRICS,
    VALIDATION_METRICS,
    charts,
    definition_of_own,
    metric_of,
    own_metrics,
    progress_metrics,
)

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
    assert {name.removeprefix("train_") for name in progress_metrics()} <= set(METRICS)


def answer(text, language="it"):
    return Answer(Prompt([], [], [], language), text, "", "", True)


def test_a_function_becomes_a_metric_for_evaluations_best_metric_suites_and_gates():
    with pytest.raises(RecipeError, match=r"`rude` is not a metric that can select weights; .*register your own"):
        load_recipe("quickstart/sft", {"train.best_metric": "rude"})

    @answer_metric(better="lower")
    def rude(answer: Answer) -> bool | None:
        """Share of answers with a rude word."""
        return None if not answer.text else "boh" in answer.text.lower()

    assert load_recipe("quickstart/sft", {"train.best_metric": "rude/it"}).train.best_metric == "rude/it"
    assert METRICS["rude"].meaning == "Share of answers with a rude word."
    assert charts()["rude"] == ("rude",)
    assert "rude" in progress_metrics()
    answers = [answer("Boh."), answer("Prego!"), answer("")]
    assert answer_metrics(answers, own=own_metrics())["rude/it"] == 0.5, "undefined for an empty answer"

    prompts = [parse_row({"prompt": "Come va?", "language": "it"})] * 3
    worse = score(prompts, [answer("Boh.")] * 3, [None] * 3)
    better = score(prompts, [answer("Bene!")] * 3, [None] * 3)
    assert (worse.metrics["rude"].value, worse.metrics["rude"].better) == (1.0, "lower")
    gate = Gate.model_validate({"title": "g", "suites": ["chat"], "metrics": {"chat/rude": {"max_drop": 0.1}}})
    models = [ModelResult("m", {"chat": result}).metrics for result in (worse, better)]
    assert [verdict.refused for verdict in decide(gate, *models)] == [True]
    assert repr(ModelResult("m", {"chat": worse})).endswith(", chat/rude 1)")
    assert "boh" in definition_of_own()["rude"], "results are cached under its code"


def test_a_metric_needs_no_parentheses():
    @answer_metric
    def curt(answer: Answer) -> bool:
        """Share of short answers."""
        return len(answer.text) < 5

    assert curt(answer("Sì.")), "it stays the function"
    assert own_metrics()["curt"] is curt
    assert METRICS["curt"].better == "higher"


def test_an_installed_package_names_metrics(monkeypatch):
    point = EntryPoint("chars", f"{__name__}:characters", metric_registry.ENTRY_POINTS)
    monkeypatch.setattr(
        metric_registry, "entry_points", lambda group: [point] if group == metric_registry.ENTRY_POINTS else []
    )
    metric_registry._load_installed.cache_clear()
    try:
        assert load_recipe("quickstart/sft", {"train.best_metric": "chars"}).train.best_metric == "chars"
        assert own_metrics() == {"chars": characters}
    finally:
        metric_registry._load_installed.cache_clear()


def characters(answer: Answer) -> int:
    return len(answer.text)


def test_mistakes_of_own_metrics():
    for name in ("stop_rate", "step", "eval_own", "Own", "own/it"):
        with pytest.raises(RecipeError, match=f"metric {name}: "):
            answer_metric(name)(characters)
    with pytest.raises(RecipeError, match=r"metric failing: fails on an answer \(ZeroDivisionError: "):
        answer_metrics([answer("Ciao")], own={"failing": lambda answer: 1 / 0})
    for build, message in {
        lambda: answer_metric(better="more"): "answer_metric: `better` must be lower or higher, not 'more'",
        lambda: answer_metric(3)(characters): "metric 3: is not a name for a metric",
        lambda: answer_metric("")(characters): "metric : is not a name for a metric",
        lambda: answer_metric()(3): "answer_metric: 3 is not a function; pass a function of one Answer",
        lambda: answer_metric()(lambda: 1): "does not take one argument; pass a function of one Answer",
        lambda: answer_metric(lambda answer, expected: 1): "does not take one argument",
        lambda: own_metrics([characters]): "metrics: must be a mapping from names to functions, not list",
        lambda: own_metrics({"own": 3}): "metrics own: 3 is not a function",
        lambda: own_metrics({3: characters}): "metric 3: is not a name",
    }.items():
        with pytest.raises(RecipeError) as caught:
            build()
        assert message in str(caught.value)
