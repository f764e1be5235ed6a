"""Alarms: the run goes on, but what comes out of it may be worse than what went in, and a team must see it.

An alarm begins when a figure is beyond its limit twice in a row, or at the end of the run: what passes by the next look
is a phase of learning. It is said once, and again only if all its figures had come back in between. What is usual is
taken from the parent's answers (DPO), or from the best that the run itself has reached (SFT). All that is known comes
from the lines of metrics.jsonl, so that a run that is continued neither repeats an alarm nor loses one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.generation.answers import SOURCE
from nesso_tune.logs import print_notes
from nesso_tune.runs.metrics_log import MetricsLog, read_metrics
from nesso_tune.training.evaluation import PARENT

Line = Mapping[str, Any]
EVENT, EARLY_STOPPED = "alarm", "early_stopped"
# Nats a token: each token of the chosen answers is a tenth less likely than under the reference, an answer of 200
# tokens e^-20 times as likely. Margins that come from the rejected answers leave it near 0; displaced likelihood
# (arXiv:2410.08847) goes on falling, so the limit need not be tight.
CHOSEN_SHIFT = -0.1
KEPT = 0.75  # of the usual share of good answers: with 8 prompts 6 of 8 are still no alarm
MANY = 4  # answers below which a share says nothing
CHANGED = 2  # answers that must have become worse
LUCK = 1  # and as many more where the best of several evaluations is what they are compared with
SOUND = 0.5  # share of good answers that a run must have reached before it can fall
END = 2 / 3  # what SFT should reach by its end where the data does not say: fewer than half good is an alarm
# Longer by half than the parent's answers and than the chosen ones, or shorter than both by as much: a change that the
# pairs show is what they teach.
GROWTH = 1.5
ROUNDING = 1e-9
HOLD = "lower train.learning_rate, raise dpo.beta, or add or raise the sft term (dpo.loss: {sigmoid: 1.0, sft: 0.2})"


@dataclass(frozen=True)
class Share:
    """A share of the answers that is watched.

    Attributes:
        alarm: its name.
        figure: of the evaluation.
        of: the figure that counts the answers.
        good: whether the answers that it counts are the good ones.
        target: the figure that says how many can be good at all; None where all can.
        what: what these answers do.
        earlier, end: what to do in SFT where it was better before, and where it never was.
    """

    alarm: str
    figure: str
    of: str
    good: bool
    target: str | None
    what: str
    earlier: str
    end: str


SHARES = (
    Share(
        "stop_rate_falls", "stop_rate", "answers", True, "expected_stop_rate", "end by themselves",
        "lower train.learning_rate, or train for fewer epochs",
        "look whether end tokens are learned (nesso-tune preview; data.train_on_eos), or train longer",
    ),
    Share(
        "language_fidelity_falls", "language_fidelity", "answers_told", True, None,
        "are in the language of their prompt",
        "look at the rows that came last, or give this language a larger share (data.mixture)",
        "give this language more rows (data.mixture), and look whether its rows are answered in it",
    ),
    Share(
        "repetition_rises", "repetition_rate", "answers", False, None, "end in a loop",
        "lower train.learning_rate, or train for fewer epochs",
        "train longer, and look for rows that repeat themselves",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A figure of a line beside its limit.

    Attributes:
        alarm, figure: names of the alarm and of the figure.
        value, limit, usual: the figure, what it must not pass, and where it usually is, on the other side of the limit.
        said: what is wrong; what to do.
        enough: whether enough answers changed to say so.
    """

    alarm: str
    figure: str
    value: float
    limit: float
    usual: float
    said: str
    enough: bool = True

    def is_beyond(self) -> bool:
        """Whether it is where it should not be."""
        return self.enough and self._past(self.limit)

    def is_back(self) -> bool:
        """Whether an alarm ends: half of the way back, so that it does not come and go with every line."""
        return not self._past((self.limit + self.usual) / 2)

    def _past(self, limit: float) -> bool:
        return (self.value - limit) * math.copysign(1.0, self.limit - self.usual) > ROUNDING


class Alarms:
    """Looks at every line of a run. Only the process that writes metrics.jsonl looks."""

    def __init__(self, log: MetricsLog, method: str, total_steps: int, looks: bool) -> None:
        self._log, self._method, self._total, self._looks = log, method, total_steps, looks
        self._parent: Line = {}
        self._evaluation: Line = {}  # the last one
        self._over = False
        self._best: dict[str, float] = {}  # share of good answers, by figure
        self._noticed: set[tuple[str, str]] = set()  # alarm and figure that was beyond its limit at the last look
        self._lasting: dict[str, set[str]] = defaultdict(set)  # figures by alarm

    def recall(self, metrics: Path) -> None:
        """Takes up where the lines of metrics.jsonl end; nothing is said or written."""
        for line in read_metrics(metrics) if self._looks and metrics.exists() else ():
            self.begun_by(line)

    def look(self, line: Line) -> None:
        """Says and writes which alarms begin with a line that was just written."""
        for one in self.begun_by(line) if self._looks else ():
            event = {"alarm": one.alarm, "figure": one.figure, "value": one.value, "limit": one.limit, "said": one.said}
            self._log.write({"step": line["step"], "event": EVENT, **event})
            print_notes(f"alarm at step {line['step']}: {one.alarm}: {one.said}")

    def begun_by(self, line: Line) -> list[Reading]:
        """The alarms that begin with a line; of each, the first of its figures that make it begin."""
        if line.get("event") == PARENT:
            self._parent = line
        if line.get("event") == EARLY_STOPPED:  # the evaluation before it was the end
            self._over, line = True, self._evaluation
        if "event" in line:
            return []
        if any(name in line for name in ("answers", "train_answers")):
            self._evaluation = line
        self._over |= line.get("step") == self._total
        found: dict[str, Reading] = {}
        before = {alarm for alarm, figures in self._lasting.items() if figures}
        for reading in self._readings({name: value for name, value in line.items() if _is_number(value)}):
            alarm, figure = reading.alarm, reading.figure
            if reading.is_beyond():
                if (alarm, figure) in self._noticed or self._over:
                    self._lasting[alarm].add(figure)
                    found.setdefault(alarm, reading)
                self._noticed.add((alarm, figure))
                continue
            self._noticed.discard((alarm, figure))
            if reading.is_back():
                self._lasting[alarm].discard(figure)
        return [reading for alarm, reading in found.items() if alarm not in before]

    def _readings(self, line: Line) -> Iterator[Reading]:
        if self._method == "dpo":
            yield from _chosen(line)
        prefix = next((prefix for prefix in ("", "train_") if f"{prefix}answers" in line), None)
        if prefix is None:  # no answers
            return
        for share in SHARES:
            for part in _parts(line, f"{prefix}{share.figure}"):
                yield from self._share(share, line, prefix, part)
        for part in _parts(line, f"{prefix}answer_length_ratio"):
            yield from self._length(line, prefix, part)

    def _share(self, share: Share, line: Line, prefix: str, part: str) -> Iterator[Reading]:
        figure = f"{prefix}{share.figure}{part}"
        value, answers = line[figure], line[f"{prefix}{share.of}{part}"]
        good, usual, beside, remedy, changed = _good(share, value), 0.0, "", HOLD, CHANGED
        reach = line[f"{prefix}{share.target}{part}"] if share.target else 1.0
        if self._method == "dpo":
            if (parents := self._parent.get(f"{share.figure}{part}")) is not None:
                usual, beside = min(_good(share, parents), reach), f"of the parent's {parents:.0%}"
        else:
            best = self._best.get(figure, 0.0)
            self._best[figure] = max(best, good)
            if best >= SOUND:
                usual, beside, remedy = min(best, reach), f"{_good(share, best):.0%} did before", share.earlier
                changed += LUCK
            end = reach if share.target else END
            if self._over and end > usual:
                usual, beside, remedy, changed = end, "and the run is over", share.end, CHANGED
        said = f"{value:.0%} of the answers{_named(part)} {share.what}, {beside}; {remedy}"
        limit, enough = KEPT * usual, answers >= MANY and (usual - good) * answers >= changed - ROUNDING
        if usual > 0:
            yield Reading(share.alarm, figure, value, _good(share, limit), _good(share, usual), said, enough)

    def _length(self, line: Line, prefix: str, part: str) -> Iterator[Reading]:
        figure = f"{prefix}answer_length_ratio{part}"
        ratio, stopped = line[figure], line.get(f"{prefix}stop_rate{part}", math.nan)
        if not self._parent.get(f"answer_tokens{part}"):
            return
        chosen = line[f"{prefix}expected_tokens{part}"] / self._parent[f"answer_tokens{part}"]
        what = (
            f"the answers{_named(part)} are {ratio:.2g} times as long as the parent's, the chosen ones {chosen:.2g} "
            f"times, and {stopped:.0%} of them end by themselves"
        )
        enough = line[f"{prefix}answers{part}"] >= MANY
        most, least = max(1.0, chosen), min(1.0, chosen)
        remedy = "set dpo.ld_alpha: 0.5, raise dpo.beta, or lower train.learning_rate"
        yield Reading("answers_grow", figure, ratio, GROWTH * most, most, f"{what}; {remedy}", enough)
        if least > 0:
            yield Reading("answers_shrink", figure, ratio, least / GROWTH, least, f"{what}; {HOLD}", enough)


def alarm_events(lines: Iterable[Line]) -> list[Line]:
    """The lines of alarms among those of metrics.jsonl."""
    return [line for line in lines if line.get("event") == EVENT]


def _chosen(line: Line) -> Iterator[Reading]:
    for figure, where in (("logps/chosen_shift", ""), ("eval_logps/chosen_shift", " of the held-out pairs")):
        if figure in line:
            shift = line[figure]
            less = f"less likely than under the reference, by {-shift:.2g} nats a token"
            said = f"the chosen answers{where} are {less}; {HOLD}"
            yield Reading("chosen_falls", figure, shift, CHOSEN_SHIFT, 0.0, said)


def _good(share: Share, value: float) -> float:
    """The share of good answers, from the figure; and the figure, from the share of good answers."""
    return value if share.good else 1 - value


def _parts(line: Line, name: str) -> list[str]:
    """What stands behind the name: nothing for the whole, then `/it` and the like; sources are not watched."""
    found = [key.removeprefix(name) for key in line if key == name or key.startswith(f"{name}/")]
    return [part for part in found if not part.startswith(f"/{SOURCE}")]


def _named(part: str) -> str:
    return f" ({part.removeprefix('/')})" if part else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
