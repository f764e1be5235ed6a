"""`nesso-tune sweep`: trains a recipe once for each combination of values, and compares the runs on one page.

The runs follow each other here, or are the tasks of a Slurm job array.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nesso_tune.cli.launch import (
    JobRecipes,
    check_plans,
    check_slurm_options,
    check_start,
    group_recipes,
    make_job,
    prepare_jobs,
    write_jobs,
)
from nesso_tune.cli.options import (
    RecipeArgument,
    SetOption,
    VerifyOption,
    check_bases,
    check_before_start,
    check_folders,
    file_path,
    world_size_from_environment,
)
from nesso_tune.cli.train import prepare_first, run_one, skip_bitsandbytes
from nesso_tune.data.privacy import Privacy
from nesso_tune.errors import GateRefused, NumericalError, Preempted, Problem, RecipeError
from nesso_tune.launch.command import verb_arguments
from nesso_tune.launch.slurm import POINT, Job
from nesso_tune.logs import logger, output_flags
from nesso_tune.metric_registry import HEADLINE, VALIDATION_METRICS, better_direction, suggest_metric
from nesso_tune.recipes.load import load_recipe, parse_overrides
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.yaml_source import OVERRIDE
from nesso_tune.runs.checkpoint import MANIFEST
from nesso_tune.runs.layout import COMPARISON, METRICS
from nesso_tune.runs.metrics_log import exported_value, read_metrics, stopped_by_callback, values_by_step

GRID = "--grid"
MAX_POINTS = 1000
MAX_VALUE_LENGTH, MAX_NAME_LENGTH = 40, 200  # of a value in the name of a run, and of the name


@dataclass(frozen=True)
class Axis:
    """A recipe key and the values that it takes."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """A combination of values: the name of its run, and its recipe."""

    name: str
    recipe: Recipe

    @property
    def run(self) -> Path:
        """The run directory."""
        return Path(self.recipe.output_dir)


@dataclass(frozen=True)
class Curve:
    """A metric of a run at its evaluations.

    Attributes:
        name: of the run.
        values: by step, in the order of steps.
        final: the value of the weights in `final/`: the last one, or that of the step which `train.best_metric` took;
            None without one.
        stopped: a callback ended the run before its last planned step.
    """

    name: str
    values: dict[int, float]
    final: float | None
    stopped: bool = False

    @classmethod
    def read(cls, point: Point, metric: str) -> Curve:
        """The curve in the metrics of a run; empty for a run that has not started."""
        file = point.run / METRICS
        lines = read_metrics(file) if file.is_file() else []
        final, stopped = exported_value(lines, metric), stopped_by_callback(lines)
        return cls(point.name, values_by_step(lines, metric), final, stopped)


def sweep(
    recipe: RecipeArgument,
    more: Annotated[
        list[str], typer.Argument(metavar="[KEY=A,B]...", help="More keys of the grid.", show_default=False)
    ] = [],  # noqa: B006 - typer copies it
    grid: Annotated[
        list[str], typer.Option(GRID, metavar="KEY=A,B", help="A recipe key and its values, separated by commas.")
    ] = [],  # noqa: B006
    settings: SetOption = [],  # noqa: B006
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="Metric that says which run is best; see docs/sweeps.md.")
    ] = "",
    stop_worse_by: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Stop a run whose metric is worse by more than X than the best one's."),
    ] = None,
    verify: VerifyOption = "sample",
    only: Annotated[
        int | None, typer.Option(POINT, min=0, metavar="N", help="Train combination N of the grid alone, from 0.")
    ] = None,
    slurm: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=file_path, help="Write a job array as an sbatch file instead.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tasks of the array that run at the same time.")
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Prepare the data in a CPU job before (with --slurm).")
    ] = False,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the sbatch file.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the sbatch file, and do nothing else.")] = False,
) -> None:
    """Train a recipe once for each combination of values, one run after another, and compare the runs on one page."""
    base = load_recipe(recipe, parse_overrides(settings))
    axes = parse_grid([*grid, *more])
    points = make_points(base, axes)
    recipes = [point.recipe for point in points]
    check_folders([point.name for point in points], recipes)  # a number and a text can look the same
    metric = _check_metric(metric or HEADLINE[base.method], recipes, stop_worse_by)
    if slurm is not None:
        _check_array(axes, only, stop_worse_by)
        flags = ["--metric", metric, *([] if verify == "sample" else ["--verify", verify]), *output_flags()]
        flags += [word for text in (*grid, *more) for word in (GRID, text)]
        group = _group(recipe, points)
        check_plans(recipes, group.machines)
        jobs = prepare_jobs([replace(group, names=[recipe], recipes=[base])], settings) if prepare else []
        jobs += [_array_job(group, verb_arguments("sweep", [recipe], settings, flags), parallel or 0)]
        if not show:
            check_start([group], recipes)
        write_jobs(jobs, slurm, show, submit)
        return
    check_slurm_options({"--parallel": parallel, "--prepare": prepare or None,
                         "--submit": submit or None, "--print": show or None})  # fmt: skip
    chosen = points if only is None else [_point(points, only)]
    _train(chosen, points, metric, stop_worse_by, verify)


# The grid


def parse_grid(texts: Sequence[str]) -> list[Axis]:
    """Parses `["train.learning_rate=1e-4,1e-3"]`; the values are those of a YAML list.

    Raises:
        RecipeError: without a key, for a key that is given twice or cannot vary, and for equal values.
    """
    if not texts:
        raise RecipeError(GRID, "is missing", f"write {GRID} train.learning_rate=1e-4,1e-3")
    axes: dict[str, Axis] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise RecipeError(GRID, f"`{text}` has no values", "write KEY=A,B")
        try:
            ((key, parsed),) = parse_overrides([f"{key}=[{values}]"]).items()
        except RecipeError as error:
            raise RecipeError(
                Problem(p.where.replace(OVERRIDE, GRID, 1), p.what, p.remedy) for p in error.problems
            ) from None
        if key in axes:
            raise RecipeError(f"{GRID} {key}", "is given twice", "write all its values in one place")
        if key in ("output_dir", "method"):
            remedy = f"every {OVERRIDE} takes one key: {OVERRIDE} {text}" if len(parsed) == 1 else "remove it"
            raise RecipeError(f"{GRID} {key}", "cannot vary in a sweep", remedy)
        if len({json.dumps(value) for value in parsed}) < len(parsed):
            raise RecipeError(f"{GRID} {key}", "has the same value twice", "remove one")
        axes[key] = Axis(key, tuple(parsed))
    return list(axes.values())


def make_points(recipe: Recipe, axes: Sequence[Axis]) -> list[Point]:
    """The combinations of all values, the last key varying fastest; each run is a folder in the recipe's `output_dir`.

    Raises:
        RecipeError: with the problems of all combinations.
    """
    if (Path(recipe.output_dir) / MANIFEST).is_file():
        raise RecipeError("output_dir", f"{recipe.output_dir} contains a run", "set another one for the sweep")
    combinations = list(itertools.islice(itertools.product(*(axis.values for axis in axes)), MAX_POINTS + 1))
    if len(combinations) > MAX_POINTS:
        raise RecipeError(GRID, f"has more than {MAX_POINTS:,} combinations", "leave out values")
    labels = _labels([axis.key for axis in axes])
    points: list[Point] = []
    problems: dict[Problem, str] = {}  # with the first combination that has it
    for values in combinations:
        name = _shortened(",".join(f"{k}={_value_in_name(v)}" for k, v in zip(labels, values, strict=True)))
        changes = {axis.key: value for axis, value in zip(axes, values, strict=True)}
        try:
            made = recipe.replace({**changes, "output_dir": f"{recipe.output_dir}/{name}"})
        except RecipeError as error:
            for problem in error.problems:
                problems.setdefault(problem, name)
            continue
        if Privacy(made.data).reveals(f"{name} {json.dumps(values)}"):
            what = "its values name a private source, and the names of the runs would show them"
            raise RecipeError(GRID, what, "leave out this key")
        points.append(Point(name, made))
    if problems:
        raise RecipeError(Problem(f"{GRID} {name}: {p.where}", p.what, p.remedy) for p, name in problems.items())
    return points


def _labels(keys: Sequence[str]) -> list[str]:
    """The last part of each key; the whole key where two have the same one."""
    short = [key.rsplit(".", 1)[-1] for key in keys]
    return [key if short.count(label) > 1 else label for key, label in zip(keys, short, strict=True)]


def _value_in_name(value: Any) -> str:
    """A value as part of a folder name; the beginning and a hash of one that cannot be."""
    text = value if isinstance(value, str) else json.dumps(value)
    safe = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip(".-") or "value"
    if isinstance(value, (int, float)) or (safe == text and len(text) <= MAX_VALUE_LENGTH):
        return text
    return f"{safe[:MAX_VALUE_LENGTH]}-{_digest(json.dumps(value))}"


def _shortened(name: str) -> str:
    """A name that file systems take: the end of a longer one is a hash."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check_metric(metric: str, recipes: Sequence[Recipe], margin: float | None) -> str:
    """The metric; raises RecipeError if it has no better direction, or if runs cannot be stopped by it."""
    if better_direction(metric) is None:
        raise RecipeError("--metric", f"`{metric}` does not say which run is better",
                          suggest_metric(metric, VALIDATION_METRICS))  # fmt: skip
    if margin is not None and any(recipe.evaluation is None for recipe in recipes):
        raise RecipeError("--stop-worse-by", "needs evaluations, and the recipe has none", "set evaluation: {}")
    return metric


# The runs


def _train(chosen: Sequence[Point], points: Sequence[Point], metric: str, margin: float | None, verify: Any) -> None:
    """Checks and trains the chosen points of all, and logs the results.

    Raises:
        NumericalError, GateRefused: of the points that failed, after the others have run.
        Preempted: if a signal asked to stop.
    """
    recipes = [point.recipe for point in chosen]  # a task of an array does not read the data of the others
    check_before_start(recipes, world_size_from_environment())
    for one in recipes:
        check_bases([one])
    logger.info(f"sweep: {len(chosen)} of {len(points)} runs in {chosen[0].run.parent}")
    warnings.filterwarnings("ignore", category=FutureWarning)  # users cannot act on those between libraries
    skip_bitsandbytes(recipes)
    with prepare_first(chosen[0].recipe):
        failures = _run_points(chosen, points, metric, margin, verify)
    _log_results(chosen, points, metric, {point.name for point, _ in failures})
    if failures:
        problems = [Problem(f"{point.name}: {p.where}", p.what, p.remedy) for point, e in failures for p in e.problems]
        raise type(failures[0][1])(problems)


def _run_points(
    points: Sequence[Point], all_points: Sequence[Point], metric: str, margin: float | None, verify: Any
) -> list[tuple[Point, NumericalError | GateRefused]]:
    """Runs the points in order; returns those that failed by their values, not by the machine.

    Raises:
        Preempted: if a signal asked to stop.
    """
    from nesso_tune.cli.main import end_process
    from nesso_tune.distributed.process_group import is_main_process, on_lost_rank
    from nesso_tune.reports.comparison import write_comparison
    from nesso_tune.training.callbacks import StopWhenWorse
    from nesso_tune.training.fit import Extensions

    on_lost_rank(end_process)
    failures: list[tuple[Point, NumericalError | GateRefused]] = []
    finished: list[Point] = []
    for i, point in enumerate(points):
        best = None if margin is None else _best([Curve.read(other, metric) for other in finished], metric)
        rule = () if best is None else (StopWhenWorse(metric, margin or 0.0, best.values, best.name, point.run),)
        try:
            result = run_one(point.name, point.recipe, Extensions.of(rule), several=True, hint="", verify=verify)
            finished.append(point)
        except (NumericalError, GateRefused) as error:
            if world_size_from_environment() > 1:  # other processes may not have come as far
                raise
            logger.warning(f"{point.name}: {error}")
            failures.append((point, error))
        finally:
            runs = [one.run for one in all_points if (one.run / MANIFEST).is_file()]
            if runs and is_main_process():
                write_comparison(runs, point.run.parent / COMPARISON, metric)
        if point in finished and result.asked_to_stop and i + 1 < len(points):
            remedy = "run the same command to continue with it"
            raise Preempted(points[i + 1].name, "stopped before it started", remedy)
    return failures


def _best(curves: Sequence[Curve], metric: str) -> Curve | None:
    """The curve with the best final value, of the runs that were not stopped; the first of equal ones."""
    known = [(curve.final, curve) for curve in curves if curve.final is not None and not curve.stopped]
    sign = 1 if better_direction(metric) == "lower" else -1
    return min(known, key=lambda pair: sign * pair[0])[1] if known else None


def _log_results(points: Sequence[Point], all_points: Sequence[Point], metric: str, failed: set[str]) -> None:
    """One line per point that was trained, the best one of all, what the seeds say of it, and where the page is."""
    from nesso_tune.reports.comparison import Comparison

    curves = {point.name: Curve.read(point, metric) for point in all_points}
    for name in (point.name for point in points):
        curve = curves[name]
        value = "not measured" if curve.final is None else f"{curve.final:.5g}"
        stopped = f" (stopped early at step {max(curve.values, default=0):,})" if curve.stopped else ""
        logger.info(f"{name}: {'failed' if name in failed else f'{metric} {value}{stopped}'}")
    finished = {one.name for one in all_points if (one.run / "final").is_dir()} - failed
    best = _best([curve for name, curve in curves.items() if name in finished], metric)
    folder = points[0].run.parent
    if best is not None:
        so_far = "" if len(finished | failed) == len(all_points) else f" of {len(finished)} finished runs"
        logger.info(f"best {metric}{so_far}: {best.name}, model in {folder / best.name / 'final'}")
        logger.info(f"next: nesso-tune chat {shlex.quote(str(folder / best.name / 'final'))}")
    runs = [point.run for point in all_points if (point.run / MANIFEST).is_file()]
    compared = Comparison.read(runs, metric)
    for line in compared.lines() if compared.has_several_seeds else compared.verdicts():
        logger.info(line)
    logger.info(f"comparison in {folder / COMPARISON}")


# The job array


def _check_array(axes: Sequence[Axis], only: int | None, margin: float | None) -> None:
    """Raises RecipeError for options and keys that the tasks of an array cannot follow: they run at the same time."""
    if only is not None:
        raise RecipeError(POINT, "has no effect with --slurm, which writes it for each task", "remove it")
    if margin is not None:
        raise RecipeError("--stop-worse-by", "compares a run with earlier ones, and the tasks of an array have none",
                          "remove it, or run the sweep without --slurm")  # fmt: skip
    for key in (axis.key for axis in axes if axis.key.split(".")[0] == "cluster"):
        raise RecipeError(f"{GRID} {key}", "cannot vary in a job array", "remove it")


def _point(points: Sequence[Point], index: int) -> Point:
    if index >= len(points):
        raise RecipeError(POINT, f"the grid has the combinations 0 to {len(points) - 1}, not {index}", "correct it")
    return points[index]


def _group(name: str, points: Sequence[Point]) -> JobRecipes:
    """All runs of the sweep as the recipes of one job, so that a container has the paths of each."""
    (group,) = group_recipes([name] * len(points), [point.recipe for point in points])
    return group


def _array_job(group: JobRecipes, arguments: list[str], parallel: int) -> Job:
    job = make_job(Path(group.names[0]).stem, group, [arguments], "train")
    beside = [job.run_dirs[0].with_name("task")]  # the name of no run: the exit files of the tasks begin with it
    return replace(job, run_dirs=beside, array=len(group.recipes), parallel=parallel)
