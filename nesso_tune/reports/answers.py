"""The HTML page with the answers of several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nesso_tune.evaluation.results import AnsweredPrompt, ModelResult
from nesso_tune.evaluation.suites import Suite
from nesso_tune.evaluation.table import to_lines
from nesso_tune.reports.html import render, write_page


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt with one answer per model, in the order of the models."""

    task: str
    answers: tuple[AnsweredPrompt, ...]

    @property
    def prompt(self) -> AnsweredPrompt:
        """Any of the answers: they share id, language and prompt."""
        return self.answers[0]


def write_answers_page(file: Path, suite: Suite, results: Sequence[ModelResult]) -> int:
    """Writes the page; returns the number of prompts on it. It opens offline.

    Only tasks of kinds other than lm-eval keep answers.
    """
    prompts = [
        ComparedPrompt(task.task, answers)
        for task in suite.tasks
        for answers in zip(*(result.tasks[task.task].answers for result in results), strict=True)
    ]
    models = [result.model for result in results]
    page = render(
        "answers.html.j2", title=suite.title, models=models, prompts=prompts, table="\n".join(to_lines(suite, results))
    )
    write_page(page, file)
    return len(prompts)
