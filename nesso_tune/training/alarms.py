"""Alarms: warnings that training degrades the model although the run continues.

An alarm starts when a metric is beyond its limit at two consecutive evaluations or log lines, or at the end of the run;
a single value may be a phase of training. It is reported once, and again only if all its metrics recovered in between.
The baseline is the parent's answers (DPO) or the best value that the run has reached (SFT). The state depends only on
the lines of `metrics.jsonl`, so a resumed run neither repeats nor loses an alarm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.generation.answers import SOURCE
from nesso_tune.logs import logger
from nesso_tune.runs.metrics_log import MetricsLog, read_metrics
from nesso_tune.training.evaluator import EARLY_STOPPED, PARENT

Line = Mapping[str, Any]
EVENT = "alarm"
# In nats/token: each token of the chosen answers is 10 % less likely than under the reference, and an answer of 200
# tokens e^-20 times as likely. If the margin comes from the rejected answers, the shift stays near 0; with likelihood
# displacement (arXiv:2410.08847) it keeps falling, so the limit need not be tight.
MIN_CHOSEN_SHIFT = -0.1
MIN_SHARE_KEPT = 0.75  # of the baseline share of good answers: 6 of 8 prompts raise no alarm
MIN_ANSWERS = 4  # with fewer answers, no share is checked
MIN_ANSWERS_LOST = 2  # good answers that must have been lost
BEST_OF_SEVERAL = 1  # additional ones if the baseline is the best of several evaluations
MIN_SFT_BASELINE = 0.5  # share of good answers that an SFT run must have reached before it can fall
SFT_FINAL_SHARE = 2 / 3  # share expected at the end of SFT: fewer than half good answers raise an alarm
# Answers are too long if they exceed both the parent's and the chosen answers by this factor, and too short likewise.
# Growth towards the chosen answers is what the pairs teach.
MAX_LENGTH_FACTOR = 1.5
TOLERANCE = 1e-9
DPO_REMEDY = (
    "lower train.learning_rate, raise dpo.beta, or add or raise the sft term (dpo.loss: {sigmoid: 1.0, sft: 0.2})"
)


class Alarms:
    """Checks each line of `metrics.jsonl`.

    Args:
        log: gets one line per alarm.
        method: `sft` or `dpo`.
        total_steps: of the plan.
        enabled: only on the process that writes `metrics.jsonl`.
    """

    def __init__(self, log: MetricsLog, method: str, total_steps: int, enabled: bool) -> None:
        self._log, self._method, self._total_steps, self._enabled = log, method, total_steps, enabled
        self._parent: Line = {}
        self._last_evaluation: Line = {}
        self._run_ended = False
        self._best: dict[str, float] = {}  # best share of good answers, by metric
        self._beyond: set[tuple[str, str]] = set()  # (alarm, metric) beyond its limit at the last line that has it
        self._active: dict[str, set[str]] = defaultdict(set)  # metrics by alarm

    def replay(self, metrics: Path) -> None:
        """Restores the state from `metrics.jsonl` without reporting anything."""
        for line in read_metrics(metrics) if self._enabled and metrics.exists() else ():
            self.started_by(line)

    def check(self, line: Line) -> None:
        """Logs and prints the alarms that start with a line just written."""
        for one in self.started_by(line) if self._enabled else ():
            event = {"alarm": one.alarm, "figure": one.metric, "value": one.value, "limit": one.limit}
            self._log.write({"step": line["step"], "event": EVENT, **event, "said": one.message})
            logger.warning(f"alarm at step {line['step']}: {one.alarm}: {one.message}")

    def started_by(self, line: Line) -> list[Measurement]:
        """The alarms that start with a line, each with its first metric beyond the limit. Updates the state."""
        if line.get("event") == PARENT:
            self._parent = line
        if line.get("event") == EARLY_STOPPED:  # the last evaluation was the final one
            self._run_ended, line = True, self._last_evaluation
        if "event" in line:
            return []
        if any(name in line for name in ("answers", "train_answers")):
            self._last_evaluation = line
        self._run_ended |= line.get("step") == self._total_steps
        found: dict[str, Measurement] = {}
        active_before = {alarm for alarm, metrics in self._active.items() if metrics}
        for one in self._measurements({name: value for name, value in line.items() if _is_finite(value)}):
            alarm, metric = one.alarm, one.metric
            if one.is_beyond():
                if (alarm, metric) in self._beyond or self._run_ended:
                    self._active[alarm].add(metric)
                    found.setdefault(alarm, one)
                self._beyond.add((alarm, metric))
                continue
            self._beyond.discard((alarm, metric))
            if one.has_recovered():
                self._active[alarm].discard(metric)
        return [one for alarm, one in found.items() if alarm not in active_before]

    def _measurements(self, line: Line) -> Iterator[Measurement]:
        if self._method == "dpo":
            yield from _chosen_shifts(line)
        prefix = next((prefix for prefix in ("", "train_") if f"{prefix}answers" in line), None)
        if prefix is None:  # no answers
            return
        for share in SHARES:
            for suffix in _suffixes(line, f"{prefix}{share.metric}"):
                yield from self._share(share, line, prefix, suffix)
        for suffix in _suffixes(line, f"{prefix}answer_length_ratio"):
            yield from self._length(line, prefix, suffix)

    def _share(self, share: Share, line: Line, prefix: str, suffix: str) -> Iterator[Measurement]:
        metric = f"{prefix}{share.metric}{suffix}"
        value, answers = line[metric], line[f"{prefix}{share.count}{suffix}"]
        good, baseline, compared, remedy, min_lost = _good(share, value), 0.0, "", DPO_REMEDY, MIN_ANSWERS_LOST
        reachable = line[f"{prefix}{share.reachable}{suffix}"] if share.reachable else 1.0
        if self._method == "dpo":
            if (parent := self._parent.get(f"{share.metric}{suffix}")) is not None:
                baseline, compared = min(_good(share, parent), reachable), f"of the parent's {parent:.0%}"
        else:
            best = self._best.get(metric, 0.0)
            self._best[metric] = max(best, good)
            if best >= MIN_SFT_BASELINE:
                baseline, remedy = min(best, reachable), share.remedy_fallen
                compared = f"{_good(share, best):.0%} at an earlier evaluation"
                min_lost += BEST_OF_SEVERAL
            final = reachable if share.reachable else SFT_FINAL_SHARE
            if self._run_ended and final > baseline:
                baseline, compared = final, "at the end of the run"
                remedy, min_lost = share.remedy_low, MIN_ANSWERS_LOST
        message = f"{value:.0%} of the answers{_in_brackets(suffix)} {share.predicate}, {compared}; {remedy}"
        limit = MIN_SHARE_KEPT * baseline
        enough = answers >= MIN_ANSWERS and (baseline - good) * answers >= min_lost - TOLERANCE
        if baseline > 0:
            yield Measurement(
                share.alarm, metric, value, _good(share, limit), _good(share, baseline), message, enough
            )  # fmt: skip

    def _length(self, line: Line, prefix: str, suffix: str) -> Iterator[Measurement]:
        metric = f"{prefix}answer_length_ratio{suffix}"
        ratio, stop_rate = line[metric], line.get(f"{prefix}stop_rate{suffix}", math.nan)
        if not self._parent.get(f"answer_tokens{suffix}"):
            return
        chosen = line[f"{prefix}expected_tokens{suffix}"] / self._parent[f"answer_tokens{suffix}"]
        what = (
            f"the answers{_in_brackets(suffix)} are {ratio:.2g} times as long as the parent's (chosen answers: "
            f"{chosen:.2g} times), and {stop_rate:.0%} of them end with the end token"
        )
        enough = line[f"{prefix}answers{suffix}"] >= MIN_ANSWERS
        longer, shorter = max(1.0, chosen), min(1.0, chosen)
        remedy = "set dpo.ld_alpha: 0.5, raise dpo.beta, or lower train.learning_rate"
        limit = MAX_LENGTH_FACTOR * longer
        yield Measurement("answers_grow", metric, ratio, limit, longer, f"{what}; {remedy}", enough)
        if shorter > 0:
            limit = shorter / MAX_LENGTH_FACTOR
            yield Measurement("answers_shrink", metric, ratio, limit, shorter, f"{what}; {DPO_REMEDY}", enough)


@dataclass(frozen=True)
class Measurement:
    """A metric of a line and its limit.

    Attributes:
        alarm: name of the alarm.
        metric: name of the metric.
        value: of the metric.
        limit: the value must not pass it.
        baseline: the expected value, on the other side of the limit.
        message: what is wrong; what to do.
        enough: whether there are enough answers for an alarm.
    """

    alarm: str
    metric: str
    value: float
    limit: float
    baseline: float
    message: str
    enough: bool = True

    def is_beyond(self) -> bool:
        """Whether the value is beyond the limit."""
        return self.enough and self._passes(self.limit)

    def has_recovered(self) -> bool:
        """Whether an active alarm ends: halfway back to the baseline (hysteresis)."""
        return not self._passes((self.limit + self.baseline) / 2)

    def _passes(self, limit: float) -> bool:
        return (self.value - limit) * math.copysign(1.0, self.limit - self.baseline) > TOLERANCE


@dataclass(frozen=True)
class Share:
    """A share of the answers that is checked.

    Attributes:
        alarm: name of the alarm.
        metric: name of the metric.
        count: the metric that counts the answers.
        counts_good: whether the metric is the share of good answers; otherwise of bad ones.
        reachable: the metric with the share that can be good at all; None for all.
        predicate: what the counted answers do, for the message.
        remedy_fallen, remedy_low: what to do in SFT if the share was better before, and if it never was good.
    """

    alarm: str
    metric: str
    count: str
    counts_good: bool
    reachable: str | None
    predicate: str
    remedy_fallen: str
    remedy_low: str


SHARES = (
    Share(
        "stop_rate_falls", "stop_rate", "answers", True, "expected_stop_rate", "end with the end token",
        "lower train.learning_rate, or train for fewer epochs",
        "check that end tokens are supervised (nesso-tune preview; data.train_on_eos), or train longer",
    ),
    Share(
        "language_fidelity_falls", "language_fidelity", "answers_told", True, None,
        "are in the language of their prompt",
        "inspect the rows trained on last, or give this language a larger share (data.mixture)",
        "give this language more rows (data.mixture), and check that its rows have answers in it",
    ),
    Share(
        "repetition_rises", "repetition_rate", "answers", False, None, "end in a loop",
        "lower train.learning_rate, or train for fewer epochs",
        "train longer, and check the data for rows that repeat themselves",
    ),
)  # fmt: skip


def alarm_events(lines: Iterable[Line]) -> list[Line]:
    """The lines of `metrics.jsonl` that are alarms."""
    return [line for line in lines if line.get("event") == EVENT]


def _chosen_shifts(line: Line) -> Iterator[Measurement]:
    for metric, where in (("logps/chosen_shift", ""), ("eval_logps/chosen_shift", " of the validation pairs")):
        if metric in line:
            shift = line[metric]
            what = f"the chosen answers{where} are {-shift:.2g} nats/token less likely than under the reference"
            yield Measurement("chosen_falls", metric, shift, MIN_CHOSEN_SHIFT, 0.0, f"{what}; {DPO_REMEDY}")


def _good(share: Share, value: float) -> float:
    """Converts the metric to the share of good answers, and back."""
    return value if share.counts_good else 1 - value


def _suffixes(line: Line, name: str) -> list[str]:
    """Suffixes of a metric in a line: empty for all answers, `/it` for those in Italian; sources are not checked."""
    found = [key.removeprefix(name) for key in line if key == name or key.startswith(f"{name}/")]
    return [suffix for suffix in found if not suffix.startswith(f"/{SOURCE}")]


def _in_brackets(suffix: str) -> str:
    return f" ({suffix.removeprefix('/')})" if suffix else ""


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
