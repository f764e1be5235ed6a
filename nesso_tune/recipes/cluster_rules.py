"""Rules of the section `cluster`: keys that the job sets itself, and values that Slurm or a container refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from nesso_tune.recipes.data_rules import Finding, Raw, get
from nesso_tune.recipes.secrets import is_secret_name
from nesso_tune.recipes.yaml_source import KeyPath

SAVE_BEFORE_S = 300  # default of cluster.save_before_s
# Patterns of words that the job script takes
LINE, VALUE = r"^[^\r\n]*\S[^\r\n]*$", r"^[^\x00]*$"
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
SLURM_WORD = r"^[^\s\"'#\\\x00]+$"
SLURM_OPTION = r"^--[a-z][a-z0-9-]*(=[^\s\"'#\\\x00]+)?$"
MOUNT = r"^/[^:,\r\n\x00]*(:/[^:,\r\n\x00]*(:(ro|rw))?)?$"
# sbatch options and variables that `launch` sets from the recipe: setting them again could conflict.
_USE_CLUSTER_KEYS = "use cluster.nodes and cluster.gpus_per_node: there is one process per GPU"
RESERVED_JOB_OPTIONS = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "ntasks-per-core", "ntasks-per-socket",
                     "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"), _USE_CLUSTER_KEYS),
    **dict.fromkeys(("cpus-per-task", "cpus-per-gpu"), "use cluster.cpus_per_gpu"),
    "time": "use cluster.time", "partition": "use cluster.partition", "account": "use cluster.account",
    "signal": "use cluster.save_before_s",
    **dict.fromkeys(("requeue", "no-requeue", "open-mode", "job-name", "wrap", "chdir"), "remove it"),
    "array": "remove it: its jobs would all write into one run directory",
    "export": "use cluster.env", "dependency": "`launch` chains the jobs of several recipes",
}  # fmt: skip
RESERVED_STEP_OPTIONS = {
    **{name: remedy for name, remedy in RESERVED_JOB_OPTIONS.items() if name not in ("requeue", "signal", "array")},
    **dict.fromkeys(("container-image", "container-mounts", "container-workdir", "container-name"),
                    "use cluster.container"),
    **dict.fromkeys(("kill-on-bad-exit", "label", "output", "error"), "remove it"),
}  # fmt: skip
# Options of container runtimes: those that `launch` writes, and those that keep the variables of the job out.
RESERVED_CONTAINER_OPTIONS = {
    **dict.fromkeys(("--bind", "-B", "--mount", "--container-mounts"), "use cluster.container.mounts"),
    **dict.fromkeys(("--nv", "--rocm", "--pwd", "--cwd", "--container-workdir", "--container-image"), "remove it"),
    **dict.fromkeys(("--cleanenv", "-e", "--containall", "-C"), "remove it: the run needs the variables of Slurm"),
}  # fmt: skip
CONTAINER_RUNTIMES = ("apptainer", "singularity", "srun", "docker", "podman", "enroot")
RESERVED_JOB_VARIABLES = {
    "OMP_NUM_THREADS": "use cluster.cpus_per_gpu", "HF_HUB_OFFLINE": "use cluster.offline",
    "CUDA_VISIBLE_DEVICES": "use cluster.gpus_per_node",
    **dict.fromkeys(("MAIN_ADDRESS", "MAIN_PORT", "NODES", "GPUS_PER_NODE", "CPUS_PER_GPU", "WORLD_SIZE", "RANK",
                     "MASTER_ADDR", "MASTER_PORT", "NESSO_TUNE_EXIT_FILE", "BESIDE_RUN", "MOUNTS", "GPU_OPTION",
                     "CONTAINER_RUNTIME", "SAVED", "IDLE", "code", "lost", "answered", "node"), "remove it"),
}  # fmt: skip
_UNEXPANDED = re.compile(r"^~|\$[A-Za-z_{(]")  # the job quotes values
SLURM_TIMES = "write it as hours:minutes:seconds or days-hours, e.g. 24:00:00 or 1-12"
RESERVED_VARIABLE_PREFIXES = ("SLURM_", "ACCELERATE_", "FSDP_", "TORCHELASTIC_", "LOCAL_")


def slurm_seconds(time: str) -> float | None:
    """Seconds of a time limit as Slurm writes it; None if it is none.

    Formats: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds, or a word for no limit.
    """
    if time.upper() in ("UNLIMITED", "INFINITE", "-1", "0"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *parts = found.groups()
    first, second, third = (None if part is None else int(part) for part in parts)
    if days is not None:
        return int(days) * 86_400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


def _cluster(raw: Raw) -> Iterator[Finding]:
    env, python = get(raw, "cluster", "env"), get(raw, "cluster", "python")
    lists = ((("extra",), RESERVED_JOB_OPTIONS), (("prepare", "extra"), RESERVED_JOB_OPTIONS),
             (("srun_options",), RESERVED_STEP_OPTIONS))  # fmt: skip
    for key, reserved_options in lists:
        options = get(raw, "cluster", *key)
        for i, option in enumerate(options if isinstance(options, (list, tuple)) else ()):
            name = str(option).removeprefix("--").split("=")[0]
            # sbatch accepts abbreviated options
            reserved = next((full for full in reserved_options if name and full.startswith(name)), None)
            if reserved is not None:
                yield Finding(("cluster", *key, i), f"--{reserved} is set by other keys", reserved_options[reserved])
    for name, value in env.items() if isinstance(env, Mapping) else ():
        if name in RESERVED_JOB_VARIABLES or str(name).startswith(RESERVED_VARIABLE_PREFIXES):
            remedy = RESERVED_JOB_VARIABLES.get(name, "remove it")
            yield Finding(("cluster", "env", name), "is set by the job itself", remedy)
        elif is_secret_name(str(name), str(value)):
            remedy = "export it where you call `launch`: jobs inherit that environment"
            yield Finding(("cluster", "env", name), "is a secret, and would be written to the job file", remedy)
        elif _UNEXPANDED.search(str(value)):
            remedy = f"write the value, or export it in cluster.setup: export {name}=…"
            yield Finding(("cluster", "env", name), f"{value} is not expanded", remedy)
    if isinstance(python, str) and python.startswith(("~", "$")):
        yield Finding(("cluster", "python"), f"{python} is not expanded", "write the path")
    first, _, rest = python.partition(" ") if isinstance(python, str) else ("", "", "")
    if (rest and not first.startswith("/")) or first.rsplit("/", 1)[-1] in CONTAINER_RUNTIMES:
        remedy = "write the path alone, or use cluster.container or cluster.setup"
        yield Finding(("cluster", "python"), "is the path of an interpreter, not a command", remedy)
    modules = get(raw, "cluster", "modules")
    for i, module in enumerate(modules if isinstance(modules, (list, tuple)) else ()):
        if isinstance(module, str) and len(module.split()) > 1:
            yield Finding(("cluster", "modules", i), f"{module} is more than one word", "write one module per item")
    if ":" in str(get(raw, "cluster", "gpu_type") or ""):
        yield Finding(("cluster", "gpu_type"), "is the type alone", "write e.g. a100 for --gres=gpu:a100:N")
    yield from _time_limits(raw)


def _time_limits(raw: Raw) -> Iterator[Finding]:
    before = get(raw, "cluster", "save_before_s")
    before = before if isinstance(before, int) else SAVE_BEFORE_S
    for key in (("cluster", "time"), ("cluster", "prepare", "time")):
        time = get(raw, *key)
        if not isinstance(time, str) or not re.fullmatch(SLURM_WORD, time):
            continue
        seconds = slurm_seconds(time)
        if seconds is None:
            yield Finding(key, f"{time} is not a time of Slurm", SLURM_TIMES)
        elif len(key) == 2 and seconds <= before:
            remedy = "raise it, or lower save_before_s"
            yield Finding(
                key, f"{time} is not longer than save_before_s ({before} s), so the run could not begin", remedy
            )


def _container(raw: Raw) -> Iterator[Finding]:
    container, options = get(raw, "cluster", "container"), get(raw, "cluster", "container", "options")
    at: KeyPath = ("cluster", "container")
    at, image = (at, container) if isinstance(container, str) else ((*at, "image"), get(container, "image"))
    for i, option in enumerate(options if isinstance(options, (list, tuple)) else ()):
        name = str(option).split("=")[0].split(" ")[0]
        if name in RESERVED_CONTAINER_OPTIONS:
            path: KeyPath = ("cluster", "container", "options", i)
            yield Finding(path, f"{name} is set by other keys", RESERVED_CONTAINER_OPTIONS[name])
    mounts = get(container, "mounts") if isinstance(container, Mapping) else None
    for i, mount in enumerate(mounts if isinstance(mounts, (list, tuple)) else ()):
        if _UNEXPANDED.search(str(mount)):
            yield Finding(("cluster", "container", "mounts", i), f"{mount} is not expanded", "write the path")
    if isinstance(image, str) and image.startswith(("~", "$")):
        yield Finding(at, f"{image} is not expanded", "write the path")
    if get(raw, "cluster", "gpu_type") is not None and get(raw, "cluster", "gpu_option") == "none":
        yield Finding(("cluster", "gpu_type"), "has no effect under gpu_option: none", "remove it")


CLUSTER_RULES = (_cluster, _container)
