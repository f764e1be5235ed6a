"""INVALSI school tests in Italian: the option with the largest log-likelihood, or the option that an answer names."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesso_tune.conversation import Conversation, Message
from nesso_tune.evaluation.prompts import Row, answer_all, read_prompts
from nesso_tune.evaluation.results import AnsweredPrompt, TaskResult, means_by_group
from nesso_tune.evaluation.suites import Task
from nesso_tune.generation.inference import ChatModel

MAX_NEW_TOKENS = 64
LETTERS = "ABCDEFGHIJ"
LABEL = re.compile(r"^\s*\(?([A-J])\s*[.):\-]\s*")  # `A. text`, `A) text`
INSTRUCTION = "Rispondi con la lettera dell'opzione corretta."
# A letter that an answer names: first as it is asked for, then after a word, then alone.
NAMED_LETTER = (
    re.compile(r"^\W*([A-J])(?=\W*$|\s*[.):\-\n])"),
    re.compile(r"(?i:\b(?:risposta|opzione|lettera|alternativa)\b[^.\n]{0,30}?)[\s\"'(«*:]([A-J])\b(?!')"),
    re.compile(r"(?<![\w'])([B-DF-HJ]|A(?=[.):]|\s[oe]\s[A-J]\b)|E(?=[.):])|I(?=[.):]))(?![\w'])"),
)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question with one right option.

    Attributes:
        id: of the question.
        text: the question, with the text that it refers to before it.
        options: texts without their letters.
        answer: index of the right option.
        grade: school year.
    """

    id: str
    text: str
    options: tuple[str, ...]
    answer: int
    grade: str


def is_generated(task: Task) -> bool:
    """Whether the model writes its choice, instead of scoring the options."""
    return task.method == "generation"


def parse_row(row: Row) -> Question | None:
    """A row of invalsi.jsonl; None if it is no question with one right option.

    Raises:
        KeyError, TypeError: if a column is missing or of another type.
    """
    options = [str(option["scelta"]).strip() for option in row["options"] or ()]
    answers = [str(answer).strip() for answer in row["answer"] or ()]
    if len(options) < 2 or len(options) > len(LETTERS) or len(answers) != 1:
        return None
    texts = [LABEL.sub("", option) for option in options]
    letters = [found[1] if (found := LABEL.match(option)) else LETTERS[i] for i, option in enumerate(options)]
    wanted = answers[0].rstrip(".)")
    matches = [i for i, (letter, text) in enumerate(zip(letters, texts, strict=True)) if wanted in (letter, text)]
    if len(matches) != 1 or len(set(letters)) < len(letters):
        return None
    context = row.get("context")
    parts = [context] if isinstance(context, str) and context.strip() else []  # pandas writes NaN for no text
    text = "\n\n".join(part.strip() for part in [*parts, str(row["question"])])
    return Question(str(row.get("ID", "")), text, tuple(texts), matches[0], str(row.get("Grado", "")))


def prompt_of(question: Question) -> str:
    """The question with its options, one per line."""
    lines = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
    return "\n".join([question.text, "", *lines])


def load_task(task: Task) -> Any:
    """lm-eval's objects of the task by log-likelihood: the letters follow `Risposta:`."""
    from lm_eval.tasks import TaskManager

    questions = read_prompts(task, parse_row)
    rows = [
        {"query": f"{prompt_of(q)}\nRisposta:", "choices": list(LETTERS[: len(q.options)]), "gold": q.answer}
        for q in questions
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        config = {
            "task": task.task, "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder, "keep_in_memory": True},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices",
            "doc_to_target": "gold", "num_fewshot": 0,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }  # fmt: skip
        return TaskManager(include_defaults=False).load([config])


def run(task: Task, questions: Sequence[Question], model: ChatModel) -> TaskResult:
    """`acc`, the share of questions whose answer names the right letter, and `answered`, of those that name any."""
    prompts = [f"{prompt_of(question)}\n\n{INSTRUCTION}" for question in questions]
    conversations = [Conversation((Message("user", prompt),), language="it") for prompt in prompts]
    answers = answer_all(model, conversations, task.max_new_tokens or MAX_NEW_TOKENS)
    chosen = [chosen_option(answer.text, question.options) for answer, question in zip(answers, questions, strict=True)]
    right = [choice == question.answer for choice, question in zip(chosen, questions, strict=True)]
    grades: Sequence[str] = [question.grade for question in questions]
    metrics = means_by_group("acc", right, [lambda i: grades[i] or None])
    metrics |= means_by_group("answered", [choice is not None for choice in chosen])
    shown = tuple(
        AnsweredPrompt(question.id, "it", prompt, answer.text, answer.stopped, passed=verdict)
        for question, prompt, answer, verdict in zip(questions, prompts, answers, right, strict=True)
    )
    return TaskResult(metrics, shown)


def chosen_option(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names, by its letter or by its whole text; None if it names none or several."""
    for pattern in NAMED_LETTER:
        letters = {letter for letter in pattern.findall(answer) if LETTERS.index(letter) < len(options)}
        if len(letters) == 1:
            return LETTERS.index(letters.pop())
        if letters:
            return None
    words = " ".join(answer.casefold().split())
    found = [i for i, option in enumerate(options) if " ".join(option.casefold().split()) in words]
    return found[0] if len(found) == 1 else None
