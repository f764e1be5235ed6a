"""`nesso-tune eval`: results of models on a suite, and the gate that compares a model with its parent."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nesso_tune.cli.options import JsonOption, file_path
from nesso_tune.errors import GateRefused, RecipeError
from nesso_tune.evaluation.suites import Suite, load_suite, with_data, with_max_new_tokens, with_metric
from nesso_tune.hub import set_offline_if_unreachable
from nesso_tune.logs import logger, output_flags, print_lines, print_text
from nesso_tune.recipes.builtin import flag_path, template_names

if TYPE_CHECKING:
    from nesso_tune.evaluation.gate import Gate, Verdict
    from nesso_tune.evaluation.judge import Judge
    from nesso_tune.evaluation.results import ModelResult
    from nesso_tune.evaluation.runner import EvaluationOptions

DEFAULT_SUITE = "nesso"
CHAT_SUITE = "chat"
ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL [MODEL ...]", help="final/ folders, run directories, checkpoints or hub ids."),
]
SuiteOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"A suite file, or {', '.join(template_names('suites'))}; default: nesso."),
]
DataOption = Annotated[
    list[str],
    typer.Option(metavar="TASK=FILE", help="Take a task's rows from a JSON file; TASK/SPLIT=FILE for one split."),
]


def eval(
    models: ModelsArgument = None,
    suite: SuiteOption = None,
    data: DataOption = [],  # noqa: B006 - typer copies it
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Suite chat with your own prompts.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="PARENT", parser=flag_path, help="Compare with this model; see --gate.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(metavar="NAME", help="Exit 7 if worse than PARENT: `default`, or a gate file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Write the answers side by side.")
    ] = None,
    judge: Annotated[str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint of a judge.")] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of answers, except in tasks of lm-eval.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of each task, for a test.")] = None,
    backend: Annotated[str, typer.Option(help="Runs the tasks of lm-eval: hf or vllm.")] = "hf",
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the tasks of lm-eval.")] = 1,
    fetch_only: Annotated[bool, typer.Option("--fetch-only", help="Download the data of the suite, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate models on a suite of tasks, and compare them with a parent."""
    _check_options(models, suite, prompts, against, gate, judge, judge_model, fetch_only)
    files = _files(data) | ({CHAT_SUITE: str(prompts)} if prompts is not None else {})
    from nesso_tune.evaluation.gate import decide_all, load_gate

    loaded_gate, suites = load_gate(gate) if gate is not None else (None, {})
    if loaded_gate is None:
        name = CHAT_SUITE if prompts is not None else suite or DEFAULT_SUITE
        suites = {name: load_suite(name)}
    suites = _with_files(suites, files)
    if max_new_tokens is not None:
        suites = {name: with_max_new_tokens(suite, max_new_tokens) for name, suite in suites.items()}
    set_offline_if_unreachable()  # before the libraries of the hub are imported
    if not sys.stderr.isatty() or output_flags():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    if fetch_only:
        _fetch(suites)
        return
    from nesso_tune.evaluation.judge import METRIC, Judge
    from nesso_tune.evaluation.runner import EvaluationOptions

    names = list(dict.fromkeys([*map(flag_path, models or ()), *([against] if against is not None else [])]))
    asked = Judge(judge, judge_model) if judge is not None and judge_model is not None else None
    results = _evaluate(names, suites, EvaluationOptions(limit, backend, batch_size), asked)
    if asked is not None:
        suites = {name: with_metric(suite, METRIC) for name, suite in suites.items()}
    if os.environ.get("RANK", "0") == "0":
        verdicts = {} if loaded_gate is None else decide_all(loaded_gate, results, str(against))
        if limit is None and max_new_tokens is None:
            own_data = {key.partition("/")[0] for key in files}
            _keep(suites, results, own_data, (str(gate), loaded_gate) if loaded_gate else None, str(against), verdicts)
        _report(suites, results, loaded_gate, against, verdicts, html, limit, as_json)


def _check_options(
    models: list[str] | None,
    suite: str | None,
    prompts: Path | None,
    against: str | None,
    gate: str | None,
    judge: str | None,
    judge_model: str | None,
    fetch_only: bool,
) -> None:
    """Raises RecipeError for options that contradict each other or have no effect."""
    if not models and not fetch_only:
        raise RecipeError("MODEL", "is missing", "name at least one model, or use --fetch-only")
    if gate is not None and against is None and not fetch_only:
        raise RecipeError("--gate", "needs a model to compare with", "add --against PARENT")
    for other, given in (("--gate", gate), ("--prompts", prompts)):
        if suite is not None and given is not None:
            raise RecipeError("--suite", f"has no effect with {other}", f"remove --suite or {other}")
    if prompts is not None and gate is not None:
        raise RecipeError("--prompts", "has no effect with --gate", "use --data chat=FILE for a gate with suite chat")
    if (judge is None) != (judge_model is None):
        missing = "--judge-model NAME" if judge_model is None else "--judge URL"
        raise RecipeError("--judge", "needs an endpoint and the name of a model", f"add {missing}")


def _files(data: list[str]) -> dict[str, str]:
    """{task: file} of the `--data` options."""
    files = {}
    for setting in data:
        task, equals, file = setting.partition("=")
        if not (task and equals and file):
            raise RecipeError("--data", f"`{setting}` is not TASK=FILE", "write e.g. --data arc_it=arc_it.jsonl")
        files[task] = flag_path(file)
    return files


def _with_files(suites: Mapping[str, Suite], files: Mapping[str, str]) -> dict[str, Suite]:
    """The suites with the files of `--data`; a file goes to every suite that has its task."""
    tasks = {name: {task.task for task in suite.tasks} for name, suite in suites.items()}
    known = set().union(*tasks.values())
    (first, *_) = suites
    own = {name: {key: file for key, file in files.items() if key.partition("/")[0] in tasks[name]} for name in suites}
    own[first] |= {key: file for key, file in files.items() if key.partition("/")[0] not in known}  # raises the error
    return {name: with_data(suite, own[name]) for name, suite in suites.items()}


def _evaluate(
    names: Sequence[str], suites: Mapping[str, Suite], options: EvaluationOptions, judge: Judge | None
) -> dict[str, list[ModelResult]]:
    """The results of every model on every suite."""
    from nesso_tune.evaluation.judge import judged
    from nesso_tune.evaluation.runner import evaluate

    found = {}
    for name, suite in suites.items():
        results = evaluate(names, suite, options)
        if judge is not None and os.environ.get("RANK", "0") == "0":
            results = [
                replace(r, tasks={task: judged(t, judge) if t.answers else t for task, t in r.tasks.items()})
                for r in results
            ]
        found[name] = results
    return found


def _report(
    suites: Mapping[str, Suite],
    results: Mapping[str, Sequence[ModelResult]],
    gate: Gate | None,
    against: str | None,
    verdicts: Mapping[str, Sequence[Verdict]],
    html: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Prints tables or JSON, and writes the page.

    Raises:
        GateRefused: if a model is worse than its parent.
    """
    from nesso_tune.evaluation.gate import refusal, verdict_lines
    from nesso_tune.evaluation.records import without_nan
    from nesso_tune.evaluation.table import to_json, to_lines
    from nesso_tune.reports.answers import write_answers_page

    if as_json:
        shown: dict[str, Any] = {}
        for name, suite in suites.items():
            _merge(shown, to_json(name, suite, results[name]))
        if gate is not None:
            shown["gate"] = {
                model: [without_nan(asdict(verdict)) for verdict in each] for model, each in verdicts.items()
            }
        print_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    for name, suite in () if as_json else suites.items():
        first = f" (the first {limit} prompts of each task)" if limit is not None else ""
        print_lines(f"{name}: {suite.title}{first}", "", *to_lines(suite, results[name]), *_cached(results[name]), "")
    if html is not None:
        for number, (name, suite) in enumerate(suites.items()):
            page = html if number == 0 else html.with_stem(f"{html.stem}-{name}")
            count = write_answers_page(page, suite, results[name])
            print_text(f"{page}: {count} prompts; open it in a browser\n", error=as_json)
    for model, each in verdicts.items():
        assert gate is not None
        if not as_json:
            print_lines(f"{model} against {against}: {gate.title}", "", *verdict_lines(gate, each), "")
    problems = [p for model, each in verdicts.items() if (error := refusal(model, str(against), each)) is not None
                for p in error.problems]  # fmt: skip
    if problems:
        raise GateRefused(problems)


def _keep(
    suites: Mapping[str, Suite],
    results: Mapping[str, Sequence[ModelResult]],
    own_data: Collection[str],
    gate: tuple[str, Gate] | None,
    against: str,
    verdicts: Mapping[str, Sequence[Verdict]],
) -> None:
    """Writes the results of models that nesso-tune trained into their folders, cards and reports.

    A folder that cannot be written to, e.g. of somebody else, is left as it is.
    """
    from nesso_tune.evaluation.records import GateRecord, SuiteRecord, gate_record, suite_record
    from nesso_tune.export.publish import keep_results
    from nesso_tune.export.stages import PROVENANCE
    from nesso_tune.generation.inference import find_model_folder
    from nesso_tune.reports.run_report import write_report
    from nesso_tune.runs.checkpoint import MANIFEST

    for name in dict.fromkeys(result.model for each in results.values() for result in each):
        folder = find_model_folder(name)
        if not (folder / PROVENANCE).is_file():
            continue
        records: list[SuiteRecord | GateRecord] = [
            suite_record(suite, suites[suite], result, own_data)
            for suite, each in results.items() for result in each if result.model == name
        ]  # fmt: skip
        if gate is not None and name in verdicts:
            records.append(gate_record(*gate, against, verdicts[name]))
        try:
            keep_results(folder, records)
            if (folder.parent / MANIFEST).is_file():
                write_report(folder.parent)
        except OSError as error:
            logger.info(f"{folder}: the results are not kept ({error.strerror})")


def _merge(shown: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Adds the JSON of a further suite: at the top for one model, under each model's name for several."""
    for key, value in more.items():
        shown.setdefault(key, {}).update(value)


def _cached(results: Sequence[ModelResult]) -> list[str]:
    names = [f"{result.model}: {task}" for result in results for task in result.tasks if task not in result.computed]
    return ["", f"from the cache: {', '.join(names)}"] if names else []


def _fetch(suites: Mapping[str, Suite]) -> None:
    """Downloads the data of all tasks."""
    from nesso_tune.evaluation.runner import fetch

    for suite in suites.values():
        for task, rows in fetch(suite).items():
            print_lines(f"{task}: {rows:,} prompts")
