"""Prompts of the tasks that are ours: rows of JSON files, and the model's answers to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nesso_tune.conversation import Conversation
from nesso_tune.data.file_formats import read_records
from nesso_tune.distributed.process_group import world_size
from nesso_tune.errors import DataError, Problem, first_line
from nesso_tune.evaluation.suites import SHIPPED_PROMPTS, SHIPPED_TOOLS, Task, shipped_file
from nesso_tune.files import sha256
from nesso_tune.generation.answers import Answer
from nesso_tune.generation.inference import AnswerLoss, ChatModel
from nesso_tune.hub import is_hub_id, set_offline_if_unreachable
from nesso_tune.logs import logger
from nesso_tune.recipes.builtin import local_path

Row = Mapping[str, Any]
Parsed = TypeVar("Parsed")
MAX_PROBLEMS = 5  # rows named in an error


def read_prompts(task: Task, parse: Callable[[Row], Parsed | None]) -> list[Parsed]:
    """The prompts of a task: its `data`, or those that nesso-tune ships for its kind.

    Args:
        task: the task.
        parse: converts a row; returns None for a row that is no prompt of this kind, and raises KeyError, TypeError or
            ValueError for one that is faulty.

    Raises:
        DataError: if the file is missing, or a row cannot be used; names the first such rows.
    """
    prompts, problems, others = [], [], 0
    name = str(task.data or SHIPPED_PROMPTS.get(task.kind))
    for where, row in _rows(task):
        try:
            prompt = parse(row)
            others += prompt is None
            prompts += [] if prompt is None else [prompt]
        except KeyError as error:
            problems.append((where, f"has no {error}"))
        except (TypeError, ValueError) as error:
            problems.append((where, first_line(error)))
    if problems:
        raise DataError(_row_problems(problems, task))
    if not prompts:
        raise DataError(name, f"contains no rows of kind {task.kind}", "see docs/evaluation.md for the format")
    if others:
        logger.info(
            f"{name}: {others:,} rows are no prompts of kind {task.kind} and are left out, {len(prompts):,} used"
        )
    return prompts


def _row_problems(problems: Sequence[tuple[str, str]], task: Task) -> list[Problem]:
    """The first faulty rows (place, what is wrong), and how many there are."""
    remedy = f"see docs/evaluation.md for rows of kind {task.kind}"
    shown = [Problem(where, what, remedy) for where, what in problems[:MAX_PROBLEMS]]
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        shown.append(Problem(str(task.data), f"{more:,} more rows are faulty", "correct those above first"))
    return shown


def _rows(task: Task) -> list[tuple[str, Row]]:
    path = data_path(task)
    if path is not None:
        return [
            (f"{where}, case {i}" if "cases" in record else where, row)
            for record, where in read_records(path)
            for i, row in enumerate(record.get("cases", [record]), 1)
        ]
    return [(f"{task.data}, row {i}", row) for i, row in enumerate(_hub_rows(task), 1)]


def data_path(task: Task) -> Path | None:
    """The local file with the prompts of a task; None for a data set of the hub.

    Raises:
        DataError: if there is no such file, or the kind has no prompts of its own.
    """
    if task.data is None:
        if task.kind not in SHIPPED_PROMPTS:
            raise DataError(f"task {task.task}", "needs a data file", f"name it: --data {task.task}=FILE")
        return shipped_file(SHIPPED_PROMPTS[task.kind])
    file = local_path(str(task.data))
    if file.is_file():
        return file
    if task.kind == "ifeval-it" and is_hub_id(str(task.data)) and not file.parent.is_dir():
        return None
    raise DataError(str(task.data), f"the data of task {task.task}: no such file", "check the path")


def definition(task: Task) -> dict[str, Any]:
    """What defines a task with prompts, for the key of its cached results."""
    file = data_path(task)
    keys = task.model_dump(mode="json", exclude={"label", "metrics", "data", "tools"})
    tools = sha256(tool_path(task)) if task.kind == "agentic" else None
    return {"keys": keys, "data": sha256(file) if file is not None else task.data, "tools": tools}


def tool_path(task: Task) -> Path:
    """The file with the tools of a task of kind agentic."""
    file = shipped_file(SHIPPED_TOOLS) if task.tools is None else local_path(task.tools)
    if not file.is_file():
        raise DataError(str(task.tools), f"the tools of task {task.task}: no such file", "check the path")
    return file


def _hub_rows(task: Task) -> list[Row]:
    """The rows of a data set of the hub, from its cache if there is no network."""
    set_offline_if_unreachable()
    from datasets import load_dataset

    name = str(task.data)
    try:
        splits = load_dataset(name)
    except Exception as error:  # datasets raises many types
        raise DataError(
            f"task {task.task}", f"its data set {name} is not at hand ({first_line(error)})",
            f"run `nesso-tune eval --fetch-only --suite …` with a network, or name a local file: "
            f"--data {task.task}=FILE",
        ) from None  # fmt: skip
    split = next((s for s in ("test", "train") if s in splits), next(iter(splits)))
    return list(splits[split])


def answer_all(model: ChatModel, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
    """The model's greedy answers, in order; ranks share the work and all get all answers."""
    return model.answers(conversations, max_new_tokens, _rank(), world_size())


def answer_losses(
    model: ChatModel, conversations: Sequence[Conversation], answers: Sequence[str | None]
) -> list[AnswerLoss | None]:
    """How likely the model finds the reference answers; None without one. Ranks share the work and all get all."""
    given = [i for i, answer in enumerate(answers) if answer]
    texts = [str(answers[i]) for i in given]
    losses = model.answer_losses([conversations[i] for i in given], texts, _rank(), world_size())
    known = dict(zip(given, losses, strict=True))
    return [known.get(i) for i in range(len(answers))]


def _rank() -> int:
    return int(os.environ.get("RANK") or "0")
