"""Small real runs: a tiny Llama with the quickstart tokenizer, few rows, float32, one thread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nesso_tune.cli.main import main
from nesso_tune.data.prepare import prepare_data
from nesso_tune.model.loading import load_model
from nesso_tune.recipes.schema import RECIPES
from tests.support.processes import ROOT, command, several  # noqa: F401 - with the runs that they start

# Cases that other cases cover in part; NESSO_TUNE_ALL=1 make test
thorough = pytest.mark.skipif("NESSO_TUNE_ALL" not in os.environ, reason="needs NESSO_TUNE_ALL=1")
BASE = ROOT / "recipes" / "quickstart" / "base"


def recipe(method, output_dir, sources, **sections):
    """A recipe with few steps; `sections` override single keys of its sections."""
    raw = {
        "method": method,
        "output_dir": str(output_dir),
        "model": {"base": str(BASE), "random_init": True, "dtype": "float32"},
        "data": {"sequence_len": 128, "validation_size": 2, "sources": [{"path": str(s)} for s in sources]},
        "train": {"max_steps": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "schedule": {"warmup_steps": 0}},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 2, "samples": 2, "max_new_tokens": 8},
        "logging": {"every_steps": 1},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return RECIPES[method].model_validate(raw)


def sums(folder):
    """A file of twelve short rows, for module-scoped fixtures."""
    rows = [{"prompt": f"Quanto fa {i} + 1?", "response": f"Fa {i + 1}.", "lang": "it"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def loaded(some):
    """The prepared data and the loaded model of a recipe."""
    data = prepare_data(some)
    return data, load_model(some.model, data.chat, some.seed)


def write_recipe(path, some):
    """Writes the recipe as YAML and returns the path as text."""
    path.write_text(some.to_yaml(), encoding="utf-8")
    return str(path)


def fresh_command(*arguments, cwd=ROOT, **environment):
    """Runs `python -m nesso_tune` in a new interpreter, for tests of what the start does; others use `command`."""
    return subprocess.run(
        [sys.executable, "-m", "nesso_tune", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        timeout=300,
    )


def main_here(capsys, *arguments):
    """Runs the command line in this process; returns exit code, stdout and stderr."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def lonely(rank, port):
    """Launcher variables of one of two ranks of which the other never joins."""
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def metrics(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(run, key="loss"):
    """{step: value} of a metric in training and evaluation lines."""
    return {line["step"]: line[key] for line in metrics(run) if key in line and "event" not in line}
