"""Suites: YAML files that list tasks, their metrics and published results to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from nesso_tune.errors import Problem, RecipeError, closest
from nesso_tune.recipes.builtin import FilePath, flag_path, shipped_folder
from nesso_tune.recipes.load import find_spec, read_spec
from nesso_tune.recipes.sections import Count, NonEmpty, Section

Kind = Literal["lm-eval", "ifeval-it", "agentic", "invalsi", "chat"]
LM_EVAL: Kind = "lm-eval"
# Prompts of each kind of task that is ours, in data_templates/evaluation/; the others have none of their own.
SHIPPED_PROMPTS: Mapping[Kind, str] = {"ifeval-it": "ifeval_it.jsonl", "agentic": "agentic.jsonl", "chat": "chat.jsonl"}
SHIPPED_TOOLS = "agentic_tools.json"


class Task(Section):
    """One task of a suite."""

    kind: Kind = LM_EVAL
    """`lm-eval` is a task or group of lm-evaluation-harness; the other kinds are described in docs/evaluation.md."""
    task: NonEmpty
    """Name of the task in lm-eval. For the other kinds, the name in results."""
    label: NonEmpty | None = None
    """Name of the row in tables, without the metric; by default the task."""
    metrics: Annotated[tuple[NonEmpty, ...], Field(strict=False, min_length=1)]
    """Reported metrics, e.g. `acc_norm`. A metric of lm-eval with a filter is written `metric,filter`."""
    few_shot: Annotated[int, Field(ge=0, le=100)] | None = None
    """Number of examples in the prompt; by default that of the task."""
    chat_template: bool | None = None
    """Whether prompts are user turns of the model's chat template. Kinds other than lm-eval always use it, except
    `invalsi` by log-likelihood, where the default is false as for lm-eval."""
    data: FilePath | dict[NonEmpty, FilePath] | None = None
    """Rows to use instead of the task's own: a JSON or JSON Lines file. For lm-eval it replaces the evaluated split; a
    task that takes examples from another split needs one file for each split, {test: FILE, train: FILE}. Kind ifeval-it
    also accepts the id of a hub data set."""
    tools: FilePath | None = None
    """JSON list of tools, for kind agentic."""
    method: Literal["loglikelihood", "generation"] | None = None
    """How the model chooses an option, for kind invalsi; by default by log-likelihood."""
    max_new_tokens: Count | None = None
    """Maximum length of an answer. For lm-eval it replaces the task's `max_gen_toks`, which some models' context is too
    short for: the result is then not comparable with published ones."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The names of its metrics in results: `task/metric`."""
        return tuple(f"{self.task}/{metric}" for metric in self.metrics)


class Suite(Section):
    """A list of tasks, and published results on them."""

    title: NonEmpty
    """One line that says what the suite measures."""
    task_folder: FilePath | None = None
    """Folder with tasks of your own: YAML files in the format of lm-eval, which may `include` others by path."""
    tasks: Annotated[tuple[Task, ...], Field(strict=False, min_length=1)]
    """The tasks, in the order of the table."""
    reference: dict[NonEmpty, dict[NonEmpty, float]] = Field(default_factory=dict)
    """Published results: {model: {task/metric: value}}. They are columns of the table."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of all tasks, in the order of the table."""
        return tuple(name for task in self.tasks for name in task.metric_names)


def load_suite(name: str) -> Suite:
    """Loads a shipped suite by name, or a suite file.

    Raises:
        RecipeError: if it does not exist or is invalid.
    """
    suite, document = read_spec(find_spec("suites", flag_path(name), "suite"), Suite)
    problems: list[Problem] = []
    seen: set[str] = set()
    for i, task in enumerate(suite.tasks):
        where = document.where(("tasks", i))
        if task.task in seen:
            problems.append(Problem(where, f"a second task `{task.task}`", "list each task once, with all its metrics"))
        seen.add(task.task)
        problems += [Problem(document.where(("tasks", i, key)), *fault) for key, fault in _inert_keys(task).items()]
    names = suite.metric_names
    for model, values in suite.reference.items():
        for metric in values:
            if metric not in names:
                near = closest(metric, names)
                remedy = f"did you mean `{near}`?" if near else "name one of its metrics as task/metric"
                place = document.where(("reference", model, metric))
                problems.append(Problem(place, f"`{metric}` is no metric of this suite", remedy))
    if problems:
        raise RecipeError(problems)
    return suite


def _inert_keys(task: Task) -> dict[str, tuple[str, str]]:
    """Keys that have no effect on this kind of task, each with what is wrong and what to do."""
    remedy = "remove it"
    found: dict[str, tuple[str, str]] = {}
    kinds: dict[str, tuple[Kind, ...]] = {
        "few_shot": (LM_EVAL,),
        "chat_template": (LM_EVAL, "invalsi"),
        "tools": ("agentic",),
        "method": ("invalsi",),
    }
    for key, allowed in kinds.items():
        if getattr(task, key) is not None and task.kind not in allowed:
            found[key] = (f"`{key}` has no effect on kind {task.kind}", remedy)
    if task.kind == "invalsi" and task.method == "generation":
        if task.chat_template is not None:
            found["chat_template"] = ("`chat_template` has no effect on `method: generation`", remedy)
    elif task.kind == "invalsi" and task.max_new_tokens is not None:
        found["max_new_tokens"] = ("`max_new_tokens` has no effect on log-likelihoods", remedy)
    if task.kind != LM_EVAL and isinstance(task.data, dict):
        found["data"] = (f"kind {task.kind} has no splits", "name one file")
    return found


def with_metric(suite: Suite, metric: str) -> Suite:
    """The suite with one more metric for every task that keeps answers."""
    tasks = [
        task if task.kind == LM_EVAL else task.model_copy(update={"metrics": (*task.metrics, metric)})
        for task in suite.tasks
    ]
    return suite.model_copy(update={"tasks": tuple(tasks)})


def with_max_new_tokens(suite: Suite, limit: int) -> Suite:
    """The suite with another maximum length of answers, for tasks of kinds other than lm-eval that generate.

    Raises:
        RecipeError: if no task of the suite does.
    """
    generate = [t.kind != LM_EVAL and not (t.kind == "invalsi" and t.method != "generation") for t in suite.tasks]
    if not any(generate):
        raise RecipeError("--max-new-tokens", "has no effect on this suite", "remove it")
    tasks = zip(suite.tasks, generate, strict=True)
    changed = [task.model_copy(update={"max_new_tokens": limit}) if own else task for task, own in tasks]
    return suite.model_copy(update={"tasks": tuple(changed)})


def with_data(suite: Suite, files: Mapping[str, str]) -> Suite:
    """The suite with the rows of tasks replaced by local files: {task: file}, or {task/split: file}.

    Raises:
        RecipeError: for a name that is no task of the suite.
    """
    tasks = {task.task: task for task in suite.tasks}
    for name, file in files.items():
        task, _, split = name.partition("/")
        if task not in tasks:
            near = closest(task, tasks)
            remedy = f"did you mean `{near}`?" if near else f"use one of {', '.join(tasks)}"
            raise RecipeError("--data", f"the suite has no task `{task}`", remedy)
        if split and tasks[task].kind != LM_EVAL:
            raise RecipeError("--data", f"task {task} has no splits", f"write {task}=FILE")
        data: object = file
        if split:
            before = tasks[task].data
            data = {**(before if isinstance(before, dict) else {}), split: file}
        tasks[task] = tasks[task].model_copy(update={"data": data})
    return suite.model_copy(update={"tasks": tuple(tasks.values())})


def shipped_file(name: str) -> Path:
    """A file of data_templates/evaluation/."""
    return shipped_folder("data_templates") / "evaluation" / name
