"""Preference pairs from several answers to each prompt: by a judge, by votes, or by checks of the answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.data.file_formats import read_records
from nesso_tune.errors import DataError, RunEnvironmentError
from nesso_tune.evaluation.judge import INSTRUCTION, Judge, judge_answer
from nesso_tune.evaluation.results import AnsweredPrompt
from nesso_tune.files import atomic_write, json_sha256
from nesso_tune.generation.answers import ends_in_loop, is_in_language
from nesso_tune.logs import logger

Scores = Sequence[float | None]  # of the answers to one prompt; None for one that is not rated


@dataclass(frozen=True)
class AnsweredLine:
    """A line of the file that `write_samples` writes: a prompt and several answers.

    Attributes:
        prompt: messages `{"role", "content"}`.
        language: code.
        answers: texts.
        stopped: whether each answer ends with the end token.
    """

    prompt: Sequence[Mapping[str, str]]
    language: str
    answers: Sequence[str]
    stopped: Sequence[bool]

    @property
    def question(self) -> str:
        """The last user turn."""
        return self.prompt[-1]["content"]


def read_answers(file: Path) -> list[AnsweredLine]:
    """The lines of a file of answers."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        AnsweredLine(
            line["prompt"], line["language"], [a["text"] for a in line["answers"]],
            [a["stopped"] for a in line["answers"]],
        )
        for line in lines
    ]  # fmt: skip


def score_by_checks(line: AnsweredLine) -> Scores:
    """The number of checks that each answer passes: it ends, has text, is in the prompt's language, and has no loop."""
    return [
        stopped + bool(text.strip()) + (is_in_language(text, line.language, "") is not False)
        + (not ends_in_loop([hash(word) for word in text.split()]))
        for text, stopped in zip(line.answers, line.stopped, strict=True)
    ]  # fmt: skip


def scores_by_votes(file: Path, lines: Sequence[AnsweredLine]) -> list[Scores]:
    """Votes for minus votes against each answer; None for an answer without a vote.

    Args:
        file: lines `{"line": 3, "chosen": 1, "rejected": 4}`: the line in the file of answers, and the numbers of two
            answers there, all from 1. A pair may be voted on several times.
        lines: the answers.

    Raises:
        DataError: if a vote names no answer.
    """
    scores: list[list[float | None]] = [[None] * len(line.answers) for line in lines]
    for vote, where in read_records(file):
        try:
            own = scores[_index(vote["line"], len(lines))]
            chosen, rejected = (_index(vote[key], len(own)) for key in ("chosen", "rejected"))
        except (LookupError, TypeError, ValueError):
            what = 'is no vote {"line", "chosen", "rejected"} on two of the answers'
            raise DataError(where, what, "number lines and answers from 1") from None
        if chosen == rejected:
            raise DataError(where, "chooses and rejects the same answer", "remove the vote")
        own[chosen] = (own[chosen] or 0) + 1
        own[rejected] = (own[rejected] or 0) - 1
    return list(scores)


def _index(number: Any, count: int) -> int:
    if not isinstance(number, int) or not 1 <= number <= count:
        raise ValueError
    return number - 1


def scores_by_judge(file: Path, lines: Sequence[AnsweredLine], judge: Judge) -> list[Scores]:
    """1 to 5 points of a judge for each answer; None for a reply without a score.

    Args:
        file: gets a line of scores for each prompt; an interrupted call continues it.
        lines: the answers.
        judge: the judge.

    Raises:
        RunEnvironmentError: if the endpoint cannot be reached, or the file has scores of other answers.
    """
    settings = json_sha256([INSTRUCTION, judge.model, [[line.question, line.answers] for line in lines]])[:16]
    scores = _read_scores(file, settings)
    if scores:
        logger.info(f"{file}: continues after {len(scores)} of {len(lines)} prompts")
    with file.open("a", encoding="utf-8") as stream:
        for line in lines[len(scores) :]:
            own = [
                judge_answer(judge, AnsweredPrompt("", line.language, line.question, text, stopped))
                for text, stopped in zip(line.answers, line.stopped, strict=True)
            ]
            stream.write(json.dumps({"scores": own, "settings": settings}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            scores.append(own)
    return scores


def _read_scores(file: Path, settings: str) -> list[Scores]:
    """Scores of earlier calls; an incomplete last line is cut."""
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    scores = []
    for number, line in enumerate(lines, 1):
        raw = json.loads(line)
        if raw["settings"] != settings:
            what = "has scores of other answers or of another judge"
            raise RunEnvironmentError(f"{file}:{number}", what, "name another output file, or remove it")
        scores.append(raw["scores"])
    with file.open("rb+") as stream:
        stream.truncate(sum(len(line) + 1 for line in lines))
    return scores


def write_pairs(file: Path, lines: Sequence[AnsweredLine], scores: Sequence[Scores]) -> int:
    """Writes a pair for each prompt whose answers differ in their scores; returns the number of pairs.

    A line is `{"prompt": messages, "chosen", "rejected", "language"}`, as `format: preference` reads it. The chosen
    answer has the highest score among those that end, the rejected one the lowest score of all; of equal ones, the
    first. An answer that was cut off is never chosen.

    Raises:
        DataError: if there is no pair.
    """
    pairs = [pair for line, own in zip(lines, scores, strict=True) if (pair := _pair(line, own)) is not None]
    if not pairs:
        raise DataError(str(file), "no prompt has two answers with different scores", "ask for more answers (--n)")
    atomic_write(file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    return len(pairs)


def _pair(line: AnsweredLine, scores: Scores) -> dict[str, Any] | None:
    rated = [(score, i) for i, score in enumerate(scores) if score is not None]
    ended = [(score, i) for score, i in rated if line.stopped[i] and line.answers[i].strip()]
    if not ended:
        return None
    (high, chosen), (low, rejected) = max(ended, key=lambda one: (one[0], -one[1])), min(rated)
    if low >= high or line.answers[chosen] == line.answers[rejected]:
        return None
    texts = {"chosen": line.answers[chosen], "rejected": line.answers[rejected]}
    return {"prompt": list(line.prompt), **texts, "language": line.language}
