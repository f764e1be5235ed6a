"""Containers of Slurm jobs: the folders that a run needs in them, and the words that start a command in one.

Paths are the same inside and outside of a container. A container may have a `/tmp` of its own.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from nesso_tune.cache import cache_root
from nesso_tune.data.files import expand, is_glob
from nesso_tune.data.sources import input_paths
from nesso_tune.errors import RecipeError
from nesso_tune.recipes.builtin import PACKAGE, find_recipe, is_run_output, local_path
from nesso_tune.recipes.schema import Recipe
from nesso_tune.recipes.sections import ClusterSection, ContainerSection

IMAGE_SUFFIXES = (".sif", ".sqsh", ".img")
UNMOUNTABLE = {"pyxis": set(":,\r\n \t"), "apptainer": set(":,\r\n")}  # pyxis writes a line with blanks between
SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib64")  # an image has its own
APPTAINER = """\
CONTAINER_RUNTIME=$(command -v apptainer || command -v singularity || true)
if [ -z "$CONTAINER_RUNTIME" ]; then
  echo "neither apptainer nor singularity is installed on $(hostname): add its module to cluster.modules" >&2
  exit 5
fi
GPU_OPTION=
if [ -e /dev/nvidiactl ]; then GPU_OPTION=--nv; elif [ -e /dev/kfd ]; then GPU_OPTION=--rocm; fi"""
PYXIS_AMD = """\
if [ -e /dev/kfd ]; then MOUNTS=$MOUNTS,/dev/kfd:/dev/kfd,/dev/dri:/dev/dri; fi"""
# The runtime's own process gets the signals of Slurm too; it inherits that USR1 is ignored
IGNORE_SIGNAL = """bash -c "trap '' USR1; exec \\"\\$@\\"" node"""


@dataclass(frozen=True)
class ContainerWords:
    """Parts of a job script that start a command in a container.

    Attributes:
        lines: lines before it.
        srun_options: further options of srun, in shell syntax.
        before: what precedes the command, in shell syntax.
    """

    lines: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def container_words(
    container: ContainerSection | None, mounts: Sequence[str], folder: str, variables: Iterable[str]
) -> ContainerWords:
    """The parts of a job script for a container; empty without one.

    Args:
        container: the section of the recipe.
        mounts: `HOST:CONTAINER` of every folder.
        folder: working directory in the container.
        variables: names of the job's variables: images may set others, and runtimes may drop some.
    """
    if container is None:
        return ContainerWords()
    listed = shlex.quote(",".join(mounts))
    options = tuple(map(shlex.quote, container.options))
    environment = ("env", '"${ENVIRONMENT[@]}"')
    lines = ("ENVIRONMENT=(", *(f'  "{name}=${name}"' for name in variables), ")", f"MOUNTS={listed}")
    image = os.path.abspath(container.image) if _is_file(container.image) else container.image
    image, workdir = shlex.quote(image), shlex.quote(folder)
    if container.runtime == "pyxis":
        srun_options = (f"--container-image={image}", '--container-mounts="$MOUNTS"', f"--container-workdir={workdir}")
        return ContainerWords((*lines, PYXIS_AMD), (*srun_options, *options), environment)
    runtime = ('"$CONTAINER_RUNTIME"', "exec", '${GPU_OPTION:+"$GPU_OPTION"}', '--bind "$MOUNTS"', f"--pwd {workdir}")
    return ContainerWords((APPTAINER, *lines), (), (IGNORE_SIGNAL, *runtime, *options, image, *environment))


def container_mounts(
    names: Sequence[str], recipes: Sequence[Recipe], cluster: ClusterSection, caches: Mapping[str, str]
) -> tuple[str, ...]:
    """`HOST:CONTAINER` of every folder that the runs need in a container, and of `cluster.container.mounts`.

    Args:
        names: the recipes, as on the command line.
        recipes: the same, loaded.
        cluster: section with a container.
        caches: folders of the caches by variable.

    Raises:
        RecipeError: if a path cannot be mounted, or the image is a file that does not exist.
    """
    container = cluster.container
    if container is None:
        return ()
    _check_image(container)
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    same = [mount.split(":") for mount in mounts]  # as [HOST, CONTAINER] or [HOST, CONTAINER, "ro" or "rw"]
    covered = {Path(words[0]): words[2:] != ["ro"] for words in same if words[0] == words[1]}  # folder: is it writable
    written = {*map(Path, caches.values()), *(_run_folder(recipe) for recipe in recipes)}
    needed = {Path(os.path.abspath(path)) for path in _needed(names, recipes, cluster, caches)}
    for path in sorted(needed):
        if path == Path("/") or set(str(path)) & UNMOUNTABLE[container.runtime]:
            what = f"{path} cannot be mounted in a container"
            raise RecipeError("cluster.container", what, "move it to a folder whose name has no colon, comma or blank")
        above = [folder for folder in covered if path.is_relative_to(folder)]
        is_writable = bool(above) and covered[max(above)]  # the deepest one
        if path in written and above and not is_writable and path in covered:
            what = f"mounts {path} read-only, and the run writes in it"
            raise RecipeError("cluster.container.mounts", what, "remove :ro")
        if not above or (path in written and not is_writable):
            covered[path] = True
            mounts.append(f"{path}:{path}")
    return tuple(mounts)


def cache_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that name the caches, with the folders that a process with this environment uses.

    `HF_HUB_CACHE` and `HF_DATASETS_CACHE` only if they are set: they lie in `HF_HOME` by default.
    """
    home = environment.get("HF_HOME")
    if not home:
        cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        home = os.path.join(cache, "huggingface")
    found = {"HF_HOME": home, "NESSO_TUNE_CACHE": environment.get("NESSO_TUNE_CACHE") or str(cache_root())}
    found |= {name: environment[name] for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE") if environment.get(name)}
    return {name: os.path.abspath(os.path.expanduser(path)) for name, path in found.items()}


def _is_file(image: str) -> bool:
    """Whether an image is a file or a folder, not a name in a registry."""
    return image.startswith(("/", "./", "../")) or (image.endswith(IMAGE_SUFFIXES) and ":" not in image)


def _check_image(container: ContainerSection) -> None:
    """Raises RecipeError if an image that is a file does not exist, or is one of another runtime."""
    image, where = container.image, "cluster.container.image"
    if _is_file(image) and not Path(image).exists():
        raise RecipeError(where, f"{image} does not exist", "correct the path, or pull the image")
    if container.runtime == "pyxis" and image.endswith(".sif"):
        remedy = "set cluster.container.runtime: apptainer, or import the image with enroot (.sqsh)"
        raise RecipeError(where, f"{image} is an image of Apptainer, and the runtime is pyxis", remedy)


def _needed(
    names: Sequence[str], recipes: Sequence[Recipe], cluster: ClusterSection, caches: Mapping[str, str]
) -> Iterator[Path]:
    """All folders that the runs read or write; a link is followed by its target's folder."""
    yield Path.cwd()
    yield from map(Path, caches.values())
    for name, recipe in zip(names, recipes, strict=True):
        yield from _folders(find_recipe(name))
        yield from _folders(_run_folder(recipe))
        yield from _base_folders(recipe.model.base)
        for _, path in input_paths(recipe):
            yield from _input_folders(path)
    yield from _code_folders(cluster)


def _run_folder(recipe: Recipe) -> Path:
    """The folder of the run directory, which may not exist yet, and can be renamed."""
    return Path(os.path.abspath(recipe.output_dir)).parent


def _base_folders(base: str) -> Iterator[Path]:
    if local_path(base).exists():
        yield from _folders(local_path(base))
        yield from (folder for file in local_path(base).iterdir() if file.is_symlink() for folder in _folders(file))
    elif is_run_output(base):
        yield Path(base).parent.parent  # of the run that creates it


def _input_folders(path: str) -> Iterator[Path]:
    root = local_path(path)
    if is_glob(path) and not root.exists():
        fixed = [*takewhile(lambda part: not is_glob(part), root.parts)]
        yield from _folders(Path(*fixed) if fixed else Path.cwd())
    else:
        yield from _folders(root)
    if root.is_dir() or (is_glob(path) and not root.exists()):
        yield from {folder for file in expand(path) for folder in _folders(file)}


def _code_folders(cluster: ClusterSection) -> Iterator[Path]:
    """The checkout of nesso-tune, and an environment of Python outside of the image."""
    if (PACKAGE.parent / "pyproject.toml").is_file():
        yield PACKAGE.parent
    python = Path(cluster.python)
    if python.is_absolute() and python.exists():
        yield from (folder for part in _folders(python) if not _of_system(folder := part.parent))  # of PREFIX/bin
    yield from (Path(path) for path in cluster.env.get("PYTHONPATH", "").split(":") if path and Path(path).is_dir())


def _of_system(folder: Path) -> bool:
    return folder == Path("/") or any(folder.is_relative_to(system) for system in SYSTEM_FOLDERS)


def _folders(path: Path) -> Iterator[Path]:
    """A folder, or the folder of a file; and those of the links that it leads through, one after the other."""
    at, seen = Path(os.path.abspath(path)), set[Path]()
    while at not in seen:
        seen.add(at)
        yield at.parent if at.is_file() else at
        link = next((part for part in (*reversed(at.parents), at) if part.is_symlink()), None)
        if link is not None:
            at = Path(os.path.normpath(link.parent / os.readlink(link) / at.relative_to(link)))
