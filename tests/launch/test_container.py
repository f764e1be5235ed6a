"""Containers: every path of a recipe is mounted, the scripts are valid, and exit codes survive a private /tmp."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nesso_tune.data.sources import input_paths
from nesso_tune.errors import RecipeError
from nesso_tune.launch.command import Machines, train_arguments
from nesso_tune.launch.container import APPTAINER, cache_variables, container_mounts
from nesso_tune.launch.slurm import Job, sbatch_text
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.schema import SFTRecipe
from nesso_tune.recipes.sections import ClusterSection
from tests.support.runs import BASE, ROOT, recipe, thorough, write_recipe

SHELLCHECK = shutil.which("shellcheck") or shutil.which(str(Path(sys.executable).parent / "shellcheck"))
ROWS = '{"prompt": "Quanto fa 1 + 1?", "response": "Fa 2."}\n'


def cluster(runtime, **container):
    return ClusterSection.model_validate({"container": {"image": "image", "runtime": runtime, **container}})


@pytest.fixture
def spread(tmp_path):
    """A recipe, as (path, loaded), whose inputs lie in folders of their own."""
    folders = ("recipe", "one", "several", "whole", "linked", "reader", "tools", "template", "held", "texts", "base")
    for name in (*folders, "between", "gate"):
        (tmp_path / name).mkdir()
    for file in (
        "one/a.jsonl",
        "several/b1.jsonl",
        "several/b2.jsonl",
        "whole/c.jsonl",
        "held/h.jsonl",
        "texts/t.jsonl",
    ):
        (tmp_path / file).write_text(ROWS)
    (tmp_path / "linked" / "far.jsonl").write_text(ROWS)
    (tmp_path / "between" / "near.jsonl").symlink_to(tmp_path / "linked" / "far.jsonl")
    (tmp_path / "whole" / "link.jsonl").symlink_to(tmp_path / "between" / "near.jsonl")
    shutil.copy(ROOT / "data_templates" / "gates" / "default.yaml", tmp_path / "gate" / "own.yaml")
    (tmp_path / "reader" / "mine.py").write_text("def read(row):\n    return row\n")
    (tmp_path / "tools" / "tools.json").write_text("[]")
    shutil.copy(ROOT / "data_templates" / "chat" / "chatml.yaml", tmp_path / "template" / "own.yaml")
    for file in BASE.iterdir():
        shutil.copy(file, tmp_path / "base")
    sources = [
        {"path": str(tmp_path / "one" / "a.jsonl"), "format": f"{tmp_path}/reader/mine.py:read"},
        {"path": f"{tmp_path}/several/b*.jsonl", "tools_file": str(tmp_path / "tools" / "tools.json")},
        {"path": str(tmp_path / "whole")},
    ]
    some = recipe(
        "sft", tmp_path / "runs" / "a" / "sft", [], model={"base": str(tmp_path / "base")},
        chat={"template": str(tmp_path / "template" / "own.yaml")},
        evaluation={"gate": str(tmp_path / "gate" / "own.yaml")},
        data={"sources": sources, "validation_sources": [{"path": str(tmp_path / "held" / "h.jsonl")}],
              "validation_size": 0, "clean": {"decontaminate": {"files": [str(tmp_path / "texts" / "t.jsonl")]}}},
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe" / "r.yaml", some)
    return path, load_recipe(path)


def test_mounts_cover_every_path_of_the_recipe(spread, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path, some = spread
    caches = cache_variables({"HF_HOME": str(tmp_path / "hf"), "NESSO_TUNE_CACHE": str(tmp_path / "cache")})
    mounts = container_mounts([path], [some], cluster("apptainer", mounts=["/scratch", "/a:/b:ro"]), caches)
    assert mounts[:2] == ("/scratch:/scratch", "/a:/b:ro")
    hosts = [Path(host) for host, target, *_ in (mount.split(":") for mount in mounts) if host == target]
    named = [file for _, file in input_paths(some)]
    assert len(named) == 9
    named += [path, some.output_dir, some.model.base, Path.cwd(), tmp_path / "linked" / "far.jsonl"]
    named += [tmp_path / "between" / "near.jsonl"]  # a link on the way to it
    named += [ROOT / "nesso_tune", *caches.values()]
    assert {Path(file) for file in named if not any(Path(file).is_relative_to(host) for host in hosts)} == set()
    assert not any(tmp_path.is_relative_to(host) for host in hosts), "no more than needed"
    assert len(hosts) == len({*hosts})
    covered = cluster("apptainer", mounts=[str(tmp_path)])
    assert container_mounts([path], [some], covered, caches)[1:] == (f"{ROOT}:{ROOT}",)


def test_what_a_run_writes_is_not_mounted_read_only(spread, tmp_path):
    path, some = spread
    above = f"{tmp_path}:{tmp_path}:ro"
    caches = {"HF_HOME": str(tmp_path / "hf")}
    mounts = container_mounts([path], [some], cluster("apptainer", mounts=[above]), caches)
    written = [f"{folder}:{folder}" for folder in (tmp_path / "hf", tmp_path / "runs" / "a")]
    assert [mount for mount in mounts if str(tmp_path) in mount] == [above, *written]
    exactly = cluster("apptainer", mounts=[f"{tmp_path}/runs/a:{tmp_path}/runs/a:ro"])
    with pytest.raises(RecipeError, match=r"cluster.container.mounts: mounts \S*/runs/a read-only, and the run writes"):
        container_mounts([path], [some], exactly, caches)


def test_paths_and_images_that_cannot_be_used(spread, tmp_path):
    path, some = spread
    with pytest.raises(RecipeError, match=r"a,b cannot be mounted in a container"):
        container_mounts([path], [some], cluster("pyxis"), {"HF_HOME": str(tmp_path / "a,b")})
    with pytest.raises(RecipeError, match=r"cluster.container.image: \S*/no.sif does not exist"):
        container_mounts([path], [some], cluster("apptainer", image=f"{tmp_path}/no.sif"), {})
    (tmp_path / "a.sif").touch()
    with pytest.raises(RecipeError, match=r"a.sif is an image of Apptainer, and the runtime is pyxis; set "):
        container_mounts([path], [some], cluster("pyxis", image=f"{tmp_path}/a.sif"), {})
    with pytest.raises(RecipeError, match=r"a b cannot be mounted in a container"):
        container_mounts([path], [some], cluster("pyxis"), {"HF_HOME": str(tmp_path / "a b")})


def test_an_image_that_is_a_file_has_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = {"container": {"image": "images/nesso.sqsh", "runtime": "pyxis"}}
    job = Job("x", Machines(), ClusterSection.model_validate(section), [["train", "r.yaml"]], "/", [tmp_path / "run"])
    assert f" --container-image={tmp_path}/images/nesso.sqsh " in sbatch_text(job)


def test_a_base_that_an_earlier_run_creates_is_mounted(spread, tmp_path):
    path, some = spread
    later = some.model_copy(update={"model": some.model.model_copy(update={"base": f"{tmp_path}/first/sft/final"})})
    assert f"{tmp_path}/first:{tmp_path}/first" in container_mounts([path], [later], cluster("pyxis"), {})


def test_text_is_the_image_as_in_earlier_recipes(spread, tmp_path):
    raw = {**spread[1].model_dump(mode="json"), "cluster": {"container": "nvcr.io#nvidia/pytorch"}}
    container = SFTRecipe.model_validate(raw).cluster.container
    assert (container.image, container.runtime, container.mounts) == ("nvcr.io#nvidia/pytorch", "pyxis", ())


def test_caches_of_the_job():
    found = cache_variables({"XDG_CACHE_HOME": "/x", "NESSO_TUNE_CACHE": "/n", "HF_DATASETS_CACHE": "/d"})
    assert found == {"HF_HOME": "/x/huggingface", "NESSO_TUNE_CACHE": "/n", "HF_DATASETS_CACHE": "/d"}


def script(runtime, folder, kind="train", steps=None, **options):
    section = {"setup": ["source /site/env.sh"], "modules": ["rocm/6"], "env": {"A_B": "it's $5"}, **options}
    if runtime is not None:
        section["container"] = {"image": "an image.sif", "runtime": runtime, "options": ["--x=a b"]}
    mounts = (f"{folder}:{folder}", "/a b:/a b") if runtime else ()
    job = Job("x", Machines(2, 4), ClusterSection.model_validate(section), steps or [train_arguments(["r.yaml"])],
              str(folder), [folder / "runs" / "sft"], kind, mounts, {"HF_HOME": "/hf"})  # fmt: skip
    return sbatch_text(job)


@pytest.mark.parametrize("kind", ["train", "doctor", "prepare"])
@pytest.mark.parametrize("runtime", [None, "pyxis", "apptainer"])
def test_scripts_are_valid(runtime, kind, tmp_path):
    (file := tmp_path / "job.sh").write_text(script(runtime, tmp_path, kind))
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    if SHELLCHECK is None:
        pytest.skip("needs shellcheck")
    done = subprocess.run([SHELLCHECK, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("devices", "option"), [(["nvidiactl"], "--nv"), (["kfd"], "--rocm"), (["nvidiactl", "kfd"], "--nv"), ([], "")]
)
def test_the_gpus_of_the_node_decide_the_option_of_apptainer(devices, option, tmp_path):
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    for device in devices:
        (tmp_path / device).touch()
    lines = APPTAINER.replace("/dev/", f"{tmp_path}/") + '\necho "$GPU_OPTION"'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-euc", lines], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"{option}\n"
    (tmp_path / "apptainer").unlink()
    done = subprocess.run(["bash", "-euc", lines], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 5
    assert "neither apptainer nor singularity is installed" in done.stderr


IN_PRIVATE_TMP = """unshare -rm sh -c 'mount -t tmpfs none /tmp && exec "$@"' sh"""
STUBS = {
    # The last line of `scontrol show hostnames` is the whole node list; of srun, only that a task failed is known
    "scontrol": 'echo "$@" >> calls; echo node1',
    "srun": f"""for word; do case $word in -*) shift;; *) break;; esac; done
case $1 in true) exit 0;; esac
SLURM_NODEID=0 {IN_PRIVATE_TMP} "$@" || exit 1""",
    "apptainer": """shift
while [ "${1#-}" != "$1" ]; do case $1 in --bind|--pwd) shift 2;; *) shift;; esac; done
shift
touch in-container
exec "$@" """,
}


@pytest.fixture
def outside():
    """A folder outside of /tmp, with stand-ins for the commands of Slurm and apptainer."""
    probe = subprocess.run([*IN_PRIVATE_TMP.split(" ")[:2], "mount", "-t", "tmpfs", "none", "/tmp"], check=False,
                           capture_output=True)  # fmt: skip
    if probe.returncode or str(ROOT).startswith("/tmp/"):
        pytest.skip("needs mount namespaces, and a checkout outside of /tmp")
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def run_job(folder, container, python, arguments):
    section = ClusterSection.model_validate({"container": container, "python": str(python), "offline": False})
    mounts = (f"{folder}:{folder}", f"{ROOT}:{ROOT}")
    job = Job("x", Machines(), section, [arguments], str(folder), [folder / "runs" / "sft"], "train", mounts)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_NNODES": "1",
                   "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    return subprocess.run(["bash"], input=sbatch_text(job), capture_output=True, text=True, env=environment, cwd=folder)


def preempted_after(folder, command):
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{command}; echo 75 > "$NESSO_TUNE_EXIT_FILE"; exit 1\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("container", [None, {"image": "image.sif", "runtime": "apptainer"}])
def test_a_saved_run_is_queued_again_though_tmp_is_private(container, outside):
    """The stand-in for python records 75 as a rank does, in the file that the job names, and saves a checkpoint."""
    python = preempted_after(outside, "mkdir -p runs/sft/checkpoint-5; touch /tmp/inside")
    done = run_job(outside, container, python, ["train", "r.yaml"])
    assert done.returncode == 75, done.stderr
    assert "requeue 7" in (outside / "calls").read_text()
    assert (outside / "in-container").exists() is (container is not None)
    assert [file.name for file in (outside / "runs").iterdir()] == ["sft"], "the file is removed"
    assert not Path("/tmp/inside").exists()


def test_a_job_that_saves_nothing_is_not_queued_again_without_end(outside):
    python = preempted_after(outside, "true")
    for start in (1, 2, 3):
        done = run_job(outside, None, python, ["train", "r.yaml"])
        assert done.returncode == 75
        assert (outside / "calls").read_text().count("requeue 7") == min(start, 2)
        assert ("stopped 3 times without a new checkpoint; this job is not queued again" in done.stderr) is (start == 3)
    assert [*(outside / "runs").iterdir()] == []


@thorough  # two processes that load torch
def test_the_job_has_the_exit_code_of_the_real_command(outside):
    some = recipe("sft", outside / "runs" / "sft", [ROOT / "recipes/quickstart/data/conversations.jsonl"],
                  model={"random_init": False})  # fmt: skip
    path = write_recipe(outside / "r.yaml", some)
    done = run_job(outside, {"image": "image.sif", "runtime": "apptainer"}, sys.executable, ["train", path])
    assert done.returncode == 4, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "has no weights" in line]
    assert re.match(rf"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ {re.escape(socket.gethostname())}: model.base ", line)
    assert "requeue" not in (outside / "calls").read_text()
