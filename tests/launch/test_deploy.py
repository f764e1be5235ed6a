"""Files for containers and clouds: linted, and their commands are those of this version."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.runs import ROOT, main_here

HADOLINT = shutil.which("hadolint") or shutil.which(str(Path(sys.executable).parent / "hadolint"))
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint")
def test_the_dockerfile_is_clean():
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_what_the_build_needs():
    """The build backend reads these files; .dockerignore must let them through."""
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    assert {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"README.md", "LICENSE", "recipes", "data_templates", "nesso_tune"} <= set(copied)
    assert 'readme = "README.md"' in project
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_cloud_example_starts_both_recipes(capsys):
    task = YAML(typ="safe").load(ROOT / "deploy" / "skypilot.yaml")
    (line,) = [line for line in task["run"].splitlines() if " launch " in line]
    gpus = int(task["resources"]["accelerators"].rpartition(":")[2])
    code, out, err = main_here(capsys, *shlex.split(line)[1:], "--gpus-per-node", gpus, "--print")
    assert code == 0, err
    words = shlex.split(out)
    assert words[words.index("--num_processes") + 1] == "8"
    assert words[-5:] == ["train", "recipes/sft.yaml", "recipes/dpo.yaml", "--set", "sft:train.global_batch_size=256"]
    code, out, _ = main_here(capsys, "check", "recipes/sft.yaml", "--gpus-per-node", gpus, "--set",
                             "train.global_batch_size=256", "--json")  # fmt: skip
    assert (code, '"global_batch": 256' in out or '"global_batch_size": 256' in out) == (0, True)
