"""`nesso-tune generate`: several sampled answers of a model to each prompt of a file, and preference pairs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nesso_tune.cli.options import file_path
from nesso_tune.errors import RecipeError
from nesso_tune.logs import print_lines
from nesso_tune.recipes.builtin import flag_path

PairsBy = Literal["judge", "votes", "metric"]


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", parser=flag_path, help="A final/ folder, run, checkpoint or hub id.")
    ],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", parser=file_path, help='Lines {"prompt": …} or {"messages": […]}.')
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", parser=file_path, help="JSON Lines file; continued.")
    ],
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="Answers per prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling: cumulative probability.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 42,
    pairs: Annotated[
        PairsBy | None,
        typer.Option(help="Write preference pairs too, to FILE-pairs.jsonl: rated by --judge, --votes, or checks."),
    ] = None,
    votes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", parser=file_path, help='Lines {"line": 3, "chosen": 1, "rejected": 4}, from 1.'),
    ] = None,
    judge: Annotated[str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint of a judge.")] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model.")] = None,
) -> None:
    """Write several answers of a model to each prompt, and preference pairs of them."""
    _check_pairs(pairs, n, votes, judge, judge_model)
    from nesso_tune.evaluation.chat import parse_row
    from nesso_tune.evaluation.prompts import read_prompts
    from nesso_tune.evaluation.suites import Task
    from nesso_tune.generation.inference import Sampling, find_model_folder, load_chat_model, model_digest
    from nesso_tune.generation.sampling import check_count, write_samples

    sampling = Sampling(max_new_tokens, temperature, top_p if temperature > 0 else 1.0)
    check_count(n, sampling, "--n", "--temperature")
    rows = read_prompts(Task(kind="chat", task="prompts", metrics=("stop_rate",), data=str(prompts)), parse_row)
    conversations = [row.conversation for row in rows]
    digest = model_digest(find_model_folder(model))
    new = write_samples(output, load_chat_model(model), digest, conversations, n, sampling, seed)
    print_lines(f"{output}: {len(rows)} prompts with {n} answers each, {new} of them new")
    if pairs is not None:
        _write_pairs(output, pairs, votes, judge, judge_model)


def _check_pairs(pairs: PairsBy | None, n: int, votes: Path | None, judge: str | None, judge_model: str | None) -> None:
    """Raises RecipeError for options of pairs that are missing, or have no effect."""
    if pairs is not None and n < 2:
        raise RecipeError("--pairs", "needs at least two answers per prompt", "set --n 2 or more")
    needed: dict[str, tuple[PairsBy, object]] = {
        "--votes": ("votes", votes), "--judge": ("judge", judge), "--judge-model": ("judge", judge_model)
    }  # fmt: skip
    for option, (by, given) in needed.items():
        if given is not None and pairs != by:
            raise RecipeError(option, f"has no effect without --pairs {by}", f"add --pairs {by}, or remove it")
        if given is None and pairs == by:
            raise RecipeError(f"--pairs {by}", f"needs {option}", f"add {option}")


def _write_pairs(output: Path, by: PairsBy, votes: Path | None, judge: str | None, judge_model: str | None) -> None:
    from nesso_tune.evaluation.judge import Judge
    from nesso_tune.evaluation.pairs import (
        Scores,
        read_answers,
        score_by_checks,
        scores_by_judge,
        scores_by_votes,
        write_pairs,
    )  # fmt: skip

    lines = read_answers(output)
    if votes is not None:
        scores = scores_by_votes(votes, lines)
    elif judge is not None and judge_model is not None:
        scores = scores_by_judge(output.with_stem(f"{output.stem}-scores"), lines, Judge(judge, judge_model))
    else:
        scores = list[Scores](map(score_by_checks, lines))
    file = output.with_stem(f"{output.stem}-pairs")
    count = write_pairs(file, lines, scores)
    print_lines(f"{file}: {count} pairs of {len(lines)} prompts, rated by {by}; train on it with `format: preference`")
