"""Runs suites on models. The result of each task is cached: an interrupted evaluation continues with the next task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cached_function
from functools import cached_property
from pathlib import Path
from typing import Any

from nesso_tune import cache
from nesso_tune.distributed.process_group import broadcast_from_rank0, init_process_group, is_main_process, world_size
from nesso_tune.errors import NessoError, Problem, RecipeError, check_instance, check_whole
from nesso_tune.evaluation import agentic, chat, harness, ifeval, invalsi, prompts
from nesso_tune.evaluation.results import ModelResult, TaskResult
from nesso_tune.evaluation.suites import LM_EVAL, Kind, Suite, Task, load_suite
from nesso_tune.files import json_sha256, sha256
from nesso_tune.generation.inference import ChatModel, find_model_folder, load_chat_model, model_digest
from nesso_tune.logs import logger
from nesso_tune.metric_registry import definition_of_own
from nesso_tune.recipes.builtin import PACKAGE

CACHE_KIND = "evaluations"
RESULT_FILE = "result.json"
TIMEOUT_S = 6 * 3600  # of collective operations: a rank may wait for another evaluation of the same task


@dataclass(frozen=True)
class OwnKind:
    """A kind of task of nesso-tune: how its rows are read, and how prompts are answered and scored."""

    parse: Callable[[prompts.Row], Any]
    run: Callable[[Task, Any, ChatModel], TaskResult]


OWN_KINDS: Mapping[Kind, OwnKind] = {
    "ifeval-it": OwnKind(ifeval.parse_row, ifeval.run),
    "agentic": OwnKind(agentic.parse_row, agentic.run),
    "chat": OwnKind(chat.parse_row, chat.run),
    "invalsi": OwnKind(invalsi.parse_row, invalsi.run),
}
OWN_CODE = ("evaluation", "generation")  # packages that decide the result of a task of ours


@dataclass(frozen=True)
class EvaluationOptions:
    """How a suite is run.

    Attributes:
        limit: number of prompts per task, the first ones; None for all.
        backend: lm-eval's model class, `hf` or `vllm`. Tasks of other kinds always use transformers.
        batch_size: of tasks of lm-eval.

    Raises:
        RecipeError: for a number that is out of range.
    """

    limit: int | None = None
    backend: str = "hf"
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_whole("limit", 1 if self.limit is None else self.limit, 1)
        check_whole("batch_size", self.batch_size, 1)


class EvaluatedModel:
    """A model folder, loaded when a task needs it."""

    def __init__(self, name: str, options: EvaluationOptions) -> None:
        self.name, self._options = name, options
        self.folder = find_model_folder(name)

    @cached_property
    def digest(self) -> str:
        """Hash of weights, configuration, tokenizer and chat template."""
        return model_digest(self.folder)

    @cached_property
    def lm(self) -> Any:
        """The model for lm-eval."""
        return harness.load_lm(self.folder, self._options.backend, self._options.batch_size, self.name)

    @cached_property
    def chat(self) -> ChatModel:
        """The model for generation."""
        return load_chat_model(str(self.folder), where=self.name)


def evaluate(
    models: str | Path | Sequence[str | Path],
    suite: str | Path | Suite = "nesso",
    options: EvaluationOptions = EvaluationOptions(),
) -> list[ModelResult]:
    """Results of all models on all tasks of a suite, from the cache where they are known.

    Started by `accelerate launch`, every rank evaluates a part of the prompts, and all ranks return all results.

    Args:
        models: model folders, run directories, checkpoints or hub ids.
        suite: a suite, its name, or a suite file.
        options: limit, backend and batch size.

    Raises:
        RecipeError: for an unknown task or metric, and without a model.
        DataError: if the data of a task is not at hand; names all of them before anything is computed.
        ModelError: if a model cannot be loaded, or has no chat template and a task needs it.
    """
    listed = [models] if isinstance(models, str | Path) else models
    names = list(map(str, listed)) if isinstance(listed, Iterable) else []
    if not names:
        raise RecipeError("models", f"must be names of models, not {models!r}", "name a final/ folder or a hub id")
    check_instance("options", options, EvaluationOptions, "EvaluationOptions(limit=20)")
    suite = suite if isinstance(suite, Suite) else load_suite(str(suite))
    definitions = check_tasks(suite, options)
    evaluated = [EvaluatedModel(name, options) for name in names]
    if world_size() > 1:
        init_process_group(TIMEOUT_S)
    missing = broadcast_from_rank0(_missing(evaluated, suite, definitions) if is_main_process() else None)
    loaded = dict(zip(missing, _for_each([t for t in suite.tasks if t.task in missing], lambda task: load(task, suite)),
                      strict=True))  # fmt: skip
    results = []
    while evaluated:
        model = evaluated.pop(0)  # its memory is free before the next one is loaded
        tasks, computed = {}, []
        for task in suite.tasks:

            def compute(task: Task = task, model: EvaluatedModel = model) -> TaskResult | None:
                return _compute(model, task, loaded.pop(task.task, None) or load(task, suite), options)

            key = cache.key_of([model.digest, definitions[suite.tasks.index(task)]])
            tasks[task.task], is_new = _cached(key, compute, f"{model.name}, {task.task}")
            computed += [task.task] if is_new else []
        results.append(ModelResult(model.name, tasks, tuple(computed)))
    return results


def check_tasks(suite: Suite, options: EvaluationOptions = EvaluationOptions()) -> list[dict[str, Any]]:
    """The definition of every task of a suite, see `definition_of`.

    Raises:
        RecipeError, DataError: for all tasks that do not exist, or whose local files do not.
        RunEnvironmentError: if a task needs lm-eval and it is not installed.
    """
    if any(harness_task(task) for task in suite.tasks):
        harness.harness_version()
        harness.check_backend(options.backend)
    return _for_each(suite.tasks, lambda task: definition_of(task, suite, options))


def harness_task(task: Task) -> bool:
    """Whether lm-eval runs a task."""
    return task.kind == LM_EVAL or (task.kind == "invalsi" and not invalsi.is_generated(task))


def definition_of(task: Task, suite: Suite, options: EvaluationOptions) -> dict[str, Any]:
    """Everything but the model that decides the result of a task.

    Raises:
        RecipeError: if there is no such task.
        DataError: if a local file does not exist.
    """
    shared: dict[str, Any] = {"limit": options.limit, "metrics": task.metrics}
    if harness_task(task):
        shared |= {"backend": options.backend, "batch_size": options.batch_size}
    if task.kind == LM_EVAL:
        return {**shared, **harness.definition(task, suite.task_folder)}
    version = {"lm-eval": harness.harness_version()} if harness_task(task) else {}
    own = definition_of_own() if task.kind == "chat" else {}
    return {**shared, **version, "code": _code_digest(), **prompts.definition(task), **({"own": own} if own else {})}


@cached_function
def _code_digest() -> str:
    files = [file for package in OWN_CODE for file in sorted((PACKAGE / package).glob("*.py"))]
    return json_sha256([sha256(file) for file in files])


def load(task: Task, suite: Suite) -> Any:
    """lm-eval's objects of a task, or the prompts of a task of nesso-tune.

    Raises:
        RecipeError: if there is no such task.
        DataError: if its data is not at hand, or cannot be used.
    """
    if task.kind == LM_EVAL:
        return harness.load_task(task, suite.task_folder)
    if harness_task(task):
        return invalsi.load_task(task)
    return prompts.read_prompts(task, OWN_KINDS[task.kind].parse)


def _for_each(tasks: Sequence[Task], function: Callable[[Task], Any]) -> list[Any]:
    """The function's value for each task; raises the problems of all tasks at once."""
    found, problems, kinds = [], list[Problem](), list[type[NessoError]]()
    for task in tasks:
        try:
            found.append(function(task))
        except NessoError as error:
            problems += error.problems
            kinds.append(type(error))
    if problems:
        raise kinds[0](problems)
    return found


def _missing(models: Sequence[EvaluatedModel], suite: Suite, definitions: Sequence[Any]) -> list[str]:
    """Tasks without a cached result for at least one model."""
    return [
        task.task
        for task, definition in zip(suite.tasks, definitions, strict=True)
        if any(cache.find(CACHE_KIND, cache.key_of([model.digest, definition])) is None for model in models)
    ]


def _compute(model: EvaluatedModel, task: Task, loaded: Any, options: EvaluationOptions) -> TaskResult | None:
    """The result of a task; on ranks other than 0 it may be None."""
    if harness_task(task):
        return harness.run_task(model.lm, task, loaded, options.limit, model.name)
    return OWN_KINDS[task.kind].run(task, loaded[: options.limit], model.chat)


def _cached(key: str, compute: Callable[[], TaskResult | None], label: str) -> tuple[TaskResult, bool]:
    """A result from the cache, or computed and stored; and whether it is new.

    Of several ranks, rank 0 holds the lock of the cache and tells the others whether to compute.
    """

    def build(folder: Path) -> dict[str, Any]:
        broadcast_from_rank0("compute")
        logger.info(f"{label}: evaluating")
        result = compute()
        assert result is not None
        (folder / RESULT_FILE).write_text(result.to_json(), encoding="utf-8")
        return {"label": label}

    def read(folder: Path, note: Mapping[str, Any]) -> TaskResult:
        try:
            return TaskResult.from_json((folder / RESULT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise cache.Damaged(f"{RESULT_FILE}: {error}") from None

    if is_main_process():
        result, _, found = cache.get_or_build(CACHE_KIND, key, build, read, label)
        return broadcast_from_rank0((result, not found))  # type: ignore[no-any-return]
    while (message := broadcast_from_rank0(None)) == "compute":
        compute()
    return message  # type: ignore[no-any-return]


def fetch(suite: Suite) -> dict[str, int]:
    """Downloads the data of all tasks into the caches of the hub, for machines without a network.

    Returns:
        The number of prompts of each task.

    Raises:
        RecipeError, DataError: for all tasks that cannot be loaded.
    """
    counts = _for_each(suite.tasks, lambda task: _count(task, load(task, suite)))
    return dict(zip([task.task for task in suite.tasks], counts, strict=True))


def _count(task: Task, loaded: Any) -> int:
    if not harness_task(task):
        return len(loaded)
    return sum(len(each.eval_docs) for each in loaded["tasks"].values())
