"""Registry of all training and evaluation metrics: meaning, which direction is better, and where they are shown.

A metric is reported over all rows under its name (`eval_loss`), per language (`eval_loss/it`), and per source
(`eval_loss/source/NAME`). docs/metrics.md describes each one in detail. `answer_metric` adds a metric of
your own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar, get_args, overload

from nesso_tune.errors import RecipeError, closest, first_line, shortened

Better = Literal["lower", "higher"]
MeasuredOn = Literal["training", "validation", "answers"]
TRAIN_PREFIX = "train_"  # of metrics measured on answers to training prompts
ENTRY_POINTS = "nesso_tune.metrics"  # group in which an installed package names its metrics
# Other keys of lines of metrics, and metrics of the suite `chat`
RESERVED = ("step", "event", "empty_rate", "judge_score", "total_steps", "seconds_left", "time", "level", "message")
AnswerScore = Callable[..., "float | bool | None"]  # of one Answer; None where it is undefined
Score = TypeVar("Score", bound=AnswerScore)


@dataclass(frozen=True)
class Metric:
    """One metric of `metrics.jsonl`.

    Attributes:
        name: its key in `metrics.jsonl`.
        meaning: definition in one line, with the formula and the unit where there is one.
        measured_on: training batches, the validation rows, or generated answers to prompts.
        better: which direction is better; None for a metric without one, which `train.best_metric` cannot name.
        method: the only method that reports it; None for both.
        chart: title of its chart in report.html; metrics with the same title share one. None for no chart.
        chart_by_source: whether report.html has a second chart, by source.
        in_progress: whether the progress line of an evaluation shows it.
    """

    name: str
    meaning: str
    measured_on: MeasuredOn
    better: Better | None = None
    method: Literal["sft", "dpo"] | None = None
    chart: str | None = None
    chart_by_source: bool = False
    in_progress: bool = False


_LOGPS = "Log-probability of the answers (nats)"
_SHIFT = "Chosen log-probability shift vs reference (nats/token)"
_ALL = (
    # Training, at every `logging.every_steps`.
    Metric("loss", "SFT: mean negative log-likelihood per supervised token (nats); DPO: optimised loss", "training",
           chart="Loss", chart_by_source=True),
    Metric("loss_sft", "the sft term of the DPO loss, unweighted", "training", method="dpo"),
    Metric("loss_preference", "sum of all other terms of the DPO loss", "training", method="dpo"),
    Metric("token_accuracy", "share of supervised tokens that are the most likely prediction", "training",
           chart="Token accuracy"),
    Metric("logps/chosen", "log-probability of the chosen answer under the policy, in nats", "training", method="dpo",
           chart=_LOGPS),
    Metric("logps/rejected", "log-probability of the rejected answer under the policy, in nats", "training",
           method="dpo", chart=_LOGPS),
    Metric("logps/chosen_shift", "(log pi - log ref) / tokens of the chosen answer, in nats/token", "training",
           method="dpo", chart=_SHIFT),
    Metric("rewards/chosen", "beta x (log pi - log ref) of the chosen answer", "training", method="dpo",
           chart="Rewards"),
    Metric("rewards/rejected", "beta x (log pi - log ref) of the rejected answer", "training", method="dpo",
           chart="Rewards"),
    Metric("rewards/margins", "rewards/chosen - rewards/rejected", "training", method="dpo", chart="Reward margin"),
    Metric("rewards/accuracies", "share of pairs with a positive margin", "training", method="dpo",
           chart="Reward accuracy"),
    # Validation rows, at every `evaluation.every_steps`.
    Metric("eval_loss", "loss on the validation rows", "validation", "lower", chart="Validation loss",
           chart_by_source=True, in_progress=True),
    Metric("eval_token_accuracy", "token accuracy on the validation rows", "validation", "higher"),
    Metric("eval_rewards/accuracies", "share of validation pairs with a positive margin", "validation", "higher",
           "dpo", chart="Validation reward accuracy", in_progress=True),
    Metric("eval_rewards/margins", "mean margin of the validation pairs", "validation", "higher", "dpo",
           chart="Validation reward margin"),
    Metric("eval_rewards/chosen", "rewards/chosen on the validation pairs", "validation", method="dpo"),
    Metric("eval_rewards/rejected", "rewards/rejected on the validation pairs", "validation", method="dpo"),
    Metric("eval_logps/chosen", "logps/chosen on the validation pairs", "validation", method="dpo"),
    Metric("eval_logps/rejected", "logps/rejected on the validation pairs", "validation", method="dpo"),
    Metric("eval_logps/chosen_shift", "logps/chosen_shift on the validation pairs", "validation", method="dpo",
           chart=_SHIFT),
    # Greedy answers to `evaluation.samples` prompts.
    Metric("answers", "number of answers", "answers"),
    Metric("stop_rate", "share of answers that end with the end token", "answers", "higher", chart="Stop rate",
           in_progress=True),
    Metric("expected_stop_rate", "share of prompts with a reference answer that fits into max_new_tokens", "answers"),
    Metric("exact_match", "share of answers equal to the reference answer", "answers", "higher", chart="Exact match",
           in_progress=True),
    Metric("language_fidelity", "share of answers in the language of their prompt, where it can be detected", "answers",
           "higher", chart="Language fidelity", in_progress=True),
    Metric("answers_told", "number of answers with a detectable language", "answers"),
    Metric("closer_to_chosen", "share of answers more similar to the chosen answer than to the rejected one",
           "answers", "higher", "dpo", in_progress=True),
    Metric("repetition_rate", "share of answers that end in a loop", "answers", "lower", chart="Repetition rate",
           in_progress=True),
    Metric("answer_tokens", "mean length of the answers in tokens", "answers", chart="Answer length (tokens)"),
    Metric("expected_tokens", "mean length of the reference answers in tokens", "answers"),
    Metric("answer_length_ratio", "answer_tokens / answer_tokens of the parent model", "answers", method="dpo",
           chart="Answer length ratio vs reference"),
    # Optimizer and throughput, at every `logging.every_steps`.
    Metric("learning_rate", "learning rate of the last step", "training", chart="Learning rate"),
    Metric("grad_norm", "norm of the whole gradient in the last step, before clipping", "training",
           chart="Gradient norm"),
    Metric("epoch", "passes over the data: steps x batch / rows", "training"),
    Metric("seconds", "seconds since the start of training, earlier sessions included", "training"),
    Metric("tokens", "tokens of the run so far, all processes, without padding", "training"),
    Metric("supervised_tokens", "supervised tokens of the run so far, all processes", "training"),
    Metric("tokens_per_second", "tokens/s since the last line, all processes", "training", chart="Tokens per second"),
    Metric("supervised_tokens_per_second", "supervised tokens/s since the last line, all processes", "training"),
    Metric("mfu", "model FLOPs utilisation: share of the dense bfloat16 peak of the device", "training",
           chart="MFU"),
    Metric("mfu_common", "mfu as other tools count it: the LM head on every token, attention over whole rows",
           "training", chart="MFU"),
    Metric("peak_memory_gb", "maximum memory of a process in 10^9 bytes", "training", chart="Memory (GB)"),
    Metric("data_wait_share", "share of the time spent waiting for the next batch, on the slowest process", "training",
           chart="Share of time waiting for data"),
)  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
# Which of two models is better, by method; a DPO loss depends on its beta, so it cannot be compared.
HEADLINE = {"sft": "eval_loss", "dpo": "eval_rewards/accuracies"}


def _selectable(measured_on: MeasuredOn) -> tuple[str, ...]:
    return tuple(metric.name for metric in _ALL if metric.better and metric.measured_on == measured_on)


# Names that `train.best_metric` can take, beside own metrics.
VALIDATION_METRICS = _selectable("validation")
ANSWER_METRICS = _selectable("answers")
_own: dict[str, AnswerScore] = {}  # registered by `answer_metric`, and installed ones


@overload
def answer_metric(function: Score, /, *, better: Better = "higher") -> Score: ...


@overload
def answer_metric(name: str | None = None, *, better: Better = "higher") -> Callable[[Score], Score]: ...


def answer_metric(name: Any = None, *, better: Better = "higher") -> Any:
    """Decorator that makes a function a metric of generated answers, measured wherever answers are: in evaluations
    during training, and in tasks of kind `chat`.

        @answer_metric(better="higher")
        def polite(answer: Answer) -> bool:
            return "grazie" in answer.text.lower()

    It is then a name for `train.best_metric`, for suites and for gates, and has a chart in report.html. A package can
    name such functions as entry points of the group `nesso_tune.metrics`; then the command line measures them too.

    Args:
        name: of the metric; by default the name of the function. `@answer_metric` without parentheses passes the
            function itself.
        better: which direction is better.

    Raises:
        RecipeError: if the name cannot be one, or is that of another metric, or the function takes no answer.
    """
    passed, name = (name, None) if callable(name) else (None, name)
    if better not in get_args(Better):
        raise RecipeError("answer_metric", f"`better` must be lower or higher, not {better!r}", "name the direction")

    def register(function: Score) -> Score:
        _check_function("answer_metric", function)
        own = getattr(function, "__name__", "") if name is None else name
        _check_own(own)
        _own[own] = function
        METRICS[own] = Metric(own, (function.__doc__ or "").strip().partition("\n")[0], "answers", better, chart=own,
                              in_progress=True)  # fmt: skip
        return function

    return register if passed is None else register(passed)


def own_metrics(more: Mapping[str, AnswerScore] | None = None) -> dict[str, AnswerScore]:
    """The functions of all own metrics by name: registered ones, installed ones, and `more`.

    Raises:
        RecipeError: if an installed metric cannot be imported, or `more` is no mapping from names to functions.
    """
    _load_installed()
    if more is not None and not isinstance(more, Mapping):
        what = f"must be a mapping from names to functions, not {type(more).__name__}"
        raise RecipeError("metrics", what, 'write {"name": function}')
    for name, function in (more or {}).items():
        _check_function(f"metrics {name}", function)
        if name not in _own:
            _check_own(name)
    return {**_own, **(more or {})}


def score_of(name: str, function: AnswerScore, answer: Any) -> float | None:
    """The score of an answer. Raises RecipeError if the function fails, or returns no number."""
    try:
        score = function(answer)
        return None if score is None else float(score)
    except Exception as error:  # of the user's code
        what = f"fails on an answer ({type(error).__name__}: {first_line(error)})"
        raise RecipeError(
            f"metric {name}", what, "return a number, a truth value, or None if it is undefined"
        ) from error


def definition_of_own() -> dict[str, str]:
    """The code of every own metric: results that depend on it are cached under it."""
    return {name: _code(function) for name, function in sorted(own_metrics().items())}


def _code(function: AnswerScore) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed into an interpreter, or not a plain function
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"


def _check_function(where: str, function: object) -> None:
    """Raises RecipeError for what cannot be called with one answer."""
    remedy = "pass a function of one Answer"
    if not callable(function):
        raise RecipeError(where, f"{shortened(repr(function))} is not a function", remedy)
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise RecipeError(where, f"{shortened(repr(function))} does not take one argument", remedy) from None
    except ValueError:  # written in C, and does not say what it takes
        pass


def _check_own(name: str) -> None:
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[a-z][a-z0-9_]*", name)
        or name.startswith((TRAIN_PREFIX, "eval_"))
    ):
        remedy = f"write lower-case letters, digits and _, and begin with neither {TRAIN_PREFIX} nor eval_"
        raise RecipeError(f"metric {name}", "is not a name for a metric", remedy)
    if name in RESERVED or any(name == metric.name for metric in _ALL):
        raise RecipeError(f"metric {name}", "is a name that nesso-tune uses itself", "choose another name")


@cache
def _load_installed() -> None:
    """Registers the functions that installed packages name; higher is better unless they are decorated themselves."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            function = point.load()
        except Exception as error:  # of the user's code
            what = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
            raise RecipeError(f"metric {point.name}", what, f"correct or uninstall {point.value}") from error
        if function not in _own.values():
            answer_metric(point.name)(function)


def progress_metrics() -> tuple[str, ...]:
    """Names on the progress line of an evaluation."""
    return (*(metric.name for metric in METRICS.values() if metric.in_progress), f"{TRAIN_PREFIX}exact_match")


def charts() -> dict[str, tuple[str, ...]]:
    """Titles of the charts in report.html, each with its metrics: those by language (`loss`) or by source
    (`loss/source`).
    """
    found: dict[str, tuple[str, ...]] = {}
    for metric in METRICS.values():
        if metric.chart is not None:
            found[metric.chart] = (*found.get(metric.chart, ()), metric.name)
            if metric.chart_by_source:
                found[f"{metric.chart} by source"] = (f"{metric.name}/source",)
    return found


def metric_of(name: str) -> Metric | None:
    """The metric of a name such as `eval_loss/it` or `train_stop_rate`; None for one that cannot select weights."""
    overall = overall_metric(name)
    return None if overall is None else METRICS[overall.removeprefix(TRAIN_PREFIX)]


def overall_metric(name: str) -> str | None:
    """The name over all rows of a metric per language or source: `eval_loss` for `eval_loss/it`.

    None for a name that `train.best_metric` cannot take.
    """
    prefix = TRAIN_PREFIX if name.startswith(TRAIN_PREFIX) else ""
    bare = name.removeprefix(prefix)
    of_answers = (*ANSWER_METRICS, *_own)
    for overall in of_answers if prefix else (*VALIDATION_METRICS, *of_answers):
        if bare == overall or bare.startswith(f"{overall}/"):
            return prefix + overall
    if not _load_installed.cache_info().currsize:  # installed metrics are looked up only for a name that is not known
        _load_installed()
        return overall_metric(name)
    return None


def better_direction(name: str) -> Better | None:
    """Whether lower or higher values of a metric are better; None if it has no such direction."""
    metric = metric_of(name)
    return None if metric is None else metric.better


def suggest_metric(name: str, measured: Iterable[str]) -> str:
    """Remedy for a metric that is not measured: the closest of the `measured` names that have a better direction."""
    names = [other for other in measured if better_direction(other) is not None]
    guess = closest(name, names)
    return f"did you mean `{guess}`? There are {', '.join(names)}" if guess else f"use one of {', '.join(names)}"
