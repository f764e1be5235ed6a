"""Tasks of EleutherAI's lm-evaluation-harness (`lm-eval`): found by name, run offline from local files, and scored."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nesso_tune.errors import DataError, ModelError, RecipeError, RunEnvironmentError, closest, first_line
from nesso_tune.evaluation.punkt import provide_punkt
from nesso_tune.evaluation.results import Metric, TaskResult, mean_of
from nesso_tune.evaluation.suites import Task
from nesso_tune.files import sha256
from nesso_tune.logs import output_flags
from nesso_tune.metric_registry import Better
from nesso_tune.recipes.builtin import local_path

TASK_NAME = re.compile(rb"^(?:task|group):[ \t]*['\"]?([\w.\-]+)['\"]?[ \t]*\r?$", re.MULTILINE)
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
CLOSE = 1e-9  # tolerance for the mean of the scores of single prompts against lm-eval's own value
BACKENDS = {"hf": "transformers", "vllm": "vllm"}  # lm-eval's name of a model class: the package that it needs


def harness_version() -> str:
    """The installed version of lm-eval.

    Raises:
        RunEnvironmentError: if it is not installed.
    """
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise RunEnvironmentError("lm-eval", "is not installed", "install it: pip install 'nesso-tune[eval]'") from None


def check_backend(name: str) -> None:
    """Raises an error for an unknown backend, or one whose package is not installed."""
    if name not in BACKENDS:
        raise RecipeError("--backend", f"there is no backend `{name}`", f"use {' or '.join(BACKENDS)}")
    if find_spec(BACKENDS[name]) is None:
        raise RunEnvironmentError("--backend", f"{name} is not installed", f"install it: pip install {BACKENDS[name]}")


def load_lm(folder: Path, backend: str, batch_size: int, where: str) -> Any:
    """The model as lm-eval's `--model BACKEND --model_args pretrained=FOLDER` loads it.

    Raises:
        ModelError: if it cannot be loaded.
    """
    _quieten()
    import lm_eval.models  # noqa: F401 - registers the model classes
    from lm_eval.api.registry import get_model

    # accelerate gives each rank its device; "cuda" without a GPU is lm-eval's way to choose the CPU
    device = {"device": "cuda:0" if _has_gpu() else "cpu"} if backend == "hf" else {}
    arguments = {"pretrained": str(folder)}
    try:
        return get_model(backend).create_from_arg_obj(arguments, {"batch_size": batch_size, **device})
    except Exception as error:  # transformers and vLLM raise many types for a damaged folder
        raise ModelError(where, f"cannot be loaded by lm-eval ({first_line(error)})", "check the folder") from error


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _quieten() -> None:
    """Errors of the libraries only, and their progress bars in terminals only."""
    import datasets

    os.environ.setdefault("LOGLEVEL", "ERROR")  # read by lm-eval
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty() or output_flags():
        datasets.disable_progress_bars()


# Finding tasks


@cache
def _shipped_tasks() -> dict[str, Path]:
    """The YAML file of each task and group that lm-eval ships.

    lm-eval's own index parses all of its 14,000 files, which takes half a minute; this reads their names only.
    """
    package = find_spec("lm_eval")
    assert package is not None
    assert package.origin is not None
    return _tasks_in(Path(package.origin).parent / "tasks")


def _tasks_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        for name in TASK_NAME.findall(file.read_bytes()):
            found.setdefault(name.decode(), file)
    return found


def task_file(name: str, task_folder: str | None) -> Path:
    """The YAML file of a task or group: in the suite's own folder, else in lm-eval.

    Raises:
        RecipeError: if there is none; names the nearest tasks.
    """
    own = _tasks_in(Path(task_folder)) if task_folder is not None else {}
    file = own.get(name) or _shipped_tasks().get(name)
    if file is None:
        names = [*own, *_shipped_tasks()]
        family = sorted(n for n, path in _shipped_tasks().items() if path.parent.name == name)
        near = [*family[:4], closest(name, [n for n in names if n.startswith(name[:2])], 0.5)]
        near += _names_around(name, names)
        shown = ", ".join(f"`{n}`" for n in list(dict.fromkeys(filter(None, near)))[:5])
        raise RecipeError(
            f"task {name}", "lm-eval has no task or group of this name", f"did you mean {shown}?" if shown else
            "`lm-eval ls tasks` lists all names",
        )  # fmt: skip
    return file


def _names_around(name: str, names: Sequence[str]) -> list[str]:
    """Up to four names that contain all words of `name`, the shortest first."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    found = [n for n in names if all(word in re.split(r"[^a-z0-9]+", n.lower()) for word in words)]
    return sorted(found, key=lambda n: (len(n), n))[:4]


def definition(task: Task, task_folder: str | None) -> dict[str, Any]:
    """Everything that defines a task, for the key of its cached results: harness, keys of the suite, files."""
    file = task_file(task.task, task_folder)
    own = Path(task_folder) if task_folder is not None else None
    files: dict[str, str] = {}
    if own is not None and file.is_relative_to(own):
        files = {str(f.relative_to(own)): sha256(f) for f in sorted(own.rglob("*")) if f.suffix in (".yaml", ".py")}
    data = task.data if isinstance(task.data, Mapping) else {"": task.data} if task.data else {}
    keys = task.model_dump(mode="json", exclude={"label", "metrics", "data"})
    return {"lm-eval": harness_version(), "keys": keys, "files": files,
            "data": {split: sha256(_data_file(task, path)) for split, path in data.items()}}  # fmt: skip


def _data_file(task: Task, path: str) -> Path:
    file = local_path(path)
    if not file.is_file():
        raise DataError(path, f"the data of task {task.task}: no such file", "check the path")
    return file


# Running tasks


def load_task(task: Task, task_folder: str | None) -> Any:
    """lm-eval's objects of a task or group, with its data.

    Raises:
        RecipeError: if there is no such task, or local files do not fit its splits.
        DataError: if its data is not at hand.
        RunEnvironmentError: if a package that the task needs is not installed.
    """
    file = task_file(task.task, task_folder)
    _quieten()
    if _needs_punkt(file):
        provide_punkt("english")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=[str(file.parent)], include_defaults=False)
    with tempfile.TemporaryDirectory() as folder:
        specs = [task.task]
        if task.data is not None:
            specs = [str(_write_local_task(task, file, manager, Path(folder)))]
        try:
            return _load(manager, specs, file)
        except ModuleNotFoundError as error:
            remedy = f"install it: pip install 'nesso-tune[eval]', or pip install {error.name}"
            raise RunEnvironmentError(f"task {task.task}", f"needs the package {error.name}", remedy) from error
        except (OSError, ImportError, ValueError, LookupError) as error:
            raise _not_at_hand(task, file, error) from error


def _load(manager: Any, specs: list[str], file: Path) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        return manager.load(specs)
    except KeyError:
        if specs[0] not in manager.all_groups:
            raise
        return TaskManager(include_path=[str(file.parent)]).load(specs)  # a group with members in other folders


def _needs_punkt(file: Path) -> bool:
    return file.parent.name == "ifeval" or b"ifeval" in file.read_bytes()


def _write_local_task(task: Task, file: Path, manager: Any, folder: Path) -> Path:
    """A task file that includes another one and reads local JSON files instead of its data set."""
    config = manager.task_index[task.task].cfg
    if isinstance(config.get("task"), list) or "output_type" not in config:
        raise RecipeError(f"data of task {task.task}", "is a group of tasks", "name one of its tasks instead")
    evaluated = config.get("test_split") or config.get("validation_split")
    files = dict(task.data) if isinstance(task.data, Mapping) else {evaluated: str(task.data)}
    used = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
    where = f"data of task {task.task}"
    for split in files:
        if split not in used.values():
            raise RecipeError(where, f"the task has no split `{split}`", f"use {', '.join(set(used.values()))}")
    examples = used.get("fewshot_split") or used.get("training_split")
    needed = [evaluated, *([examples] if task.few_shot and examples else [])]
    for split in needed:
        if split not in files:
            remedy = f"add a file for it: --data {task.task}/{split}=FILE"
            if split != evaluated:
                remedy += f", with --data {task.task}/{evaluated}=FILE for the evaluated rows, or set few_shot: 0"
            raise RecipeError(where, f"has no file for the split `{split}`", remedy)
    lines = {
        "include": str(file), "task": task.task, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": {s: str(_data_file(task, p).resolve()) for s, p in files.items()}},
        **{key: None for key, split in used.items() if split not in files},
    }  # fmt: skip
    path = folder / "task.yaml"
    path.write_text(json.dumps(lines, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    return path


def _not_at_hand(task: Task, file: Path, error: Exception) -> DataError:
    """The error of a task whose data cannot be loaded: which data set, and how to get it."""
    where = f"task {task.task}"
    if task.data is not None:
        names = task.data.values() if isinstance(task.data, Mapping) else [task.data]
        return DataError(", ".join(names), f"{where} cannot use its rows ({first_line(error)})", "check the file")
    found = re.search(r"'([\w.\-]+/[\w.\-]+)'", str(error))
    name = f"data set {found[1]}" if found else f"the data set of {file.name}"
    return DataError(
        where, f"its {name} is not at hand ({first_line(error)})",
        f"run `nesso-tune eval --fetch-only --suite …` with a network, or name a local file: --data {task.task}=FILE",
    )  # fmt: skip


def run_task(lm: Any, task: Task, loaded: Any, limit: int | None, where: str) -> TaskResult | None:
    """Metrics of a model on a task, as lm-eval computes them; None on ranks other than 0.

    Args:
        lm: from `load_lm`.
        task: the suite's task.
        loaded: from `load_task`, new: lm-eval changes it.
        limit: number of prompts per task.
        where: name of the model in errors.

    Raises:
        RecipeError: if the task has no such metric.
        ModelError: if the chat template is needed and the model has none.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if task.chat_template and getattr(lm.tokenizer, "chat_template", None) is None:
        raise ModelError(where, f"has no chat template, which task {task.task} needs", "evaluate a chat model")
    if task.max_new_tokens and not any(t.OUTPUT_TYPE == "generate_until" for t in loaded["tasks"].values()):
        raise RecipeError(f"task {task.task}", "`max_new_tokens` has no effect: it generates nothing", "remove it")
    evaluate = partial(
        simple_evaluate,
        model=lm,
        tasks=[*loaded["groups"].values()] or [*loaded["tasks"].values()],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=task.few_shot,
        limit=limit,
        apply_chat_template=bool(task.chat_template),
        fewshot_as_multiturn=bool(task.chat_template),
        gen_kwargs={"max_gen_toks": task.max_new_tokens} if task.max_new_tokens else None,
    )
    try:
        out = evaluate()
    except AssertionError as error:  # lm-eval's checks of a model against a task
        remedy = "set max_new_tokens for this task in the suite if the model's context is too short, else see --debug"
        raise ModelError(where, f"cannot do task {task.task} ({first_line(error)})", remedy) from error
    return None if out is None else _result(task, out)


def _result(task: Task, out: Mapping[str, Any]) -> TaskResult:
    values: dict[str, Any] = {**out["results"], **out.get("groups", {})}[task.task]
    metrics = {}
    for name in task.metrics:
        key = name if "," in name else next((k for k in values if k.partition(",")[0] == name), name)
        if key not in values:
            known = sorted({k.partition(",")[0] for k in values if isinstance(values[k], (int, float)) and "," in k})
            shown = ", ".join(k for k in known if not k.endswith("_stderr"))
            raise RecipeError(f"task {task.task}", f"has no metric `{name}`", f"use {shown}")
        base, _, kind = key.partition(",")
        higher = out["higher_is_better"].get(task.task, {}).get(base)
        better: Better | None = None if higher is None else "higher" if higher else "lower"
        metrics[name] = _metric(values[key], values.get(f"{base}_stderr,{kind}"), _scores(out, base, kind), better)
    return TaskResult(metrics)


def _scores(out: Mapping[str, Any], metric: str, kind: str) -> list[tuple[int, float, float]]:
    """(prompt, score, weight) of every prompt; lists of verdicts weigh as many as they are."""
    found: list[tuple[int, float, float]] = []
    offset = 0
    for task in sorted(out["samples"]):
        rows = [row for row in out["samples"][task] if row["filter"] == kind and metric in row]
        for row in rows:
            score = row[metric]
            if isinstance(score, list) and score and all(isinstance(s, (bool, int, float)) for s in score):
                found.append((offset + row["doc_id"], sum(score) / len(score), len(score)))
            elif isinstance(score, (bool, int, float)):
                found.append((offset + row["doc_id"], float(score), 1.0))
            else:
                return []
        offset += 1 + max((row["doc_id"] for row in rows), default=-1)
    return sorted(found)


def _metric(value: float, stderr: Any, scores: Sequence[tuple[int, float, float]], better: Better | None) -> Metric:
    """lm-eval's value and standard error, with the scores of single prompts if they reproduce the value."""
    error = float(stderr) if isinstance(stderr, (int, float)) else None
    if not scores:
        return Metric(float(value), error, better=better)
    prompts, points, weights = (list(column) for column in zip(*scores, strict=True))
    own = mean_of(points, prompts, weights if len(set(weights)) > 1 else ())
    if not abs(own.value - value) <= CLOSE:
        return Metric(float(value), error, better=better)
    return Metric(float(value), own.stderr if error is None else error, own.scores, own.weights, own.prompts, better)
