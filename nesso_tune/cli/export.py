"""`nesso-tune export`: a finished run in another format; `nesso-tune card`: its model card."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nesso_tune.cli.options import file_path
from nesso_tune.errors import RecipeError, RunEnvironmentError
from nesso_tune.hub import check_repository_name
from nesso_tune.logs import logger, print_lines

if TYPE_CHECKING:
    from nesso_tune.export.exporter import Format

FormatOption = Literal["hf", "adapter", "gguf", "mlx"]
# Packages of the writer and of the runtime, each with the command that installs it.
WRITERS = {"gguf": ("gguf", "pip install 'nesso-tune[gguf]'"), "mlx": ("mlx_lm", "pip install 'nesso-tune[mlx]'")}
RUNTIMES = {"gguf": ("xllamacpp", "pip install 'nesso-tune[gguf]'")}


DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="float32 (f32), bfloat16 (bf16), float16 (f16), for gguf q8_0; default: as final/."
    ),
]
AverageOption = Annotated[
    str | None,
    typer.Option(metavar="last:K|A,B,...", help="Average the K newest checkpoints, or checkpoints, runs and models."),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FOLDER", parser=file_path, help="Folder; default RUN/export/FORMAT."),
]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=file_path, help="Run directory of a finished run.")],
    to: Annotated[
        FormatOption,
        typer.Option(
            "--to", help="hf: a complete model; adapter: for peft; gguf: llama.cpp, Ollama; mlx: Apple silicon."
        ),
    ] = "hf",
    dtype: DtypeOption = None,
    average: AverageOption = None,
    folder: FolderOption = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Do not compare the answers in the runtime of the format.")
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Show what an upload to the hub would contain; with --yes, upload it.")
    ] = False,
    repo: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Repository for --push.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; by default private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Upload.")] = False,
) -> None:
    """Export a finished run to another format, and check its answers there."""
    _check_push(push, repo, public, yes)
    _check_packages(to, unchecked)
    logger.info("loading the libraries")
    from nesso_tune.export.exporter import export as export_run
    from nesso_tune.export.weights import FinishedRun

    finished = FinishedRun.open(run)
    if repo is not None:  # before an earlier export is replaced
        from nesso_tune.export.push import check_card_section, check_complete

        check_card_section(finished)
        if yes:
            check_complete(finished, to)
    done = export_run(finished, _format(to), dtype, average, folder, not unchecked)
    logger.info(f"export in {done.folder}")
    if to == "gguf":
        from nesso_tune.export.gguf_format import quantisation_command

        file = next(done.folder.glob("*.gguf"))
        logger.info(f"to quantise it further with llama.cpp: {quantisation_command(file)}")

    if repo is not None:
        from nesso_tune.export.push import plan_upload
        from nesso_tune.export.push import push as upload

        planned = plan_upload(finished, done.folder, repo, public)
        print_lines(*planned.lines())
        logger.info(f"uploaded to {upload(planned)}" if yes else f"nothing was uploaded: {planned.next_step}")


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=file_path, help="Run directory of a finished run.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that was edited by hand.")] = False,
) -> None:
    """Write the model card of a finished run again, after its recipe's card section was completed."""
    from nesso_tune.export.card import renew_card

    print_lines(f"card  {renew_card(run, overwrite)}")


def _check_push(push: bool, repo: str | None, public: bool, yes: bool) -> None:
    if push and repo is None:
        raise RecipeError("--push", "has no repository", "add --repo ORG/NAME")
    if repo is not None:
        check_repository_name(repo)
    for option in (name for name, given in {"--repo": repo, "--public": public, "--yes": yes}.items() if given):
        if not push:
            raise RecipeError(option, "has no effect without --push", "add --push, or remove it")
    if yes and not os.environ.get("HF_TOKEN"):  # before the export, which takes longer
        raise RunEnvironmentError("--push", "HF_TOKEN is not set", "export HF_TOKEN with a token that can write")


def _check_packages(to: str, unchecked: bool) -> None:
    """Raises RunEnvironmentError if the writer or the runtime of a format is not installed."""
    for name, command in ([WRITERS[to]] if to in WRITERS else []) + ([RUNTIMES[to]] if to in RUNTIMES else []):
        is_runtime = RUNTIMES.get(to, ("",))[0] == name
        if find_spec(name) is None and not (is_runtime and unchecked):
            skip = ", or export with --unchecked" if is_runtime else ""
            raise RunEnvironmentError(f"--to {to}", f"{name} is not installed", f"{command}{skip}")


def _format(to: str) -> Format:
    if to == "gguf":
        from nesso_tune.export.gguf_format import GGUF

        return GGUF
    from nesso_tune.export.folder_formats import ADAPTER, HF, MLX

    return {"adapter": ADAPTER, "mlx": MLX}.get(to, HF)
