"""Run directories written by hand: as files of a run, without training one."""

import json
import time
from dataclasses import asdict

from nesso_tune.runs.run_status import RunStatus


def write_run(folder, lines, *, recipe=None, state="finished", salt="0"):
    """Writes a run directory and returns its path.

    Args:
        folder: the run directory.
        lines: of metrics.jsonl.
        recipe: as manifest.json has it; `method: sft`, `seed: 1` and `output_dir` are added.
        state: of status.json; a `finished` run has final/. None for no status.
        salt: of the private values in the manifest.
    """
    folder.mkdir(parents=True)
    full = {"method": "sft", "seed": 1, "output_dir": str(folder), **(recipe or {})}
    manifest = {"nesso_tune": "0.1.0", "recipe": full, "salt": salt, "world_size": 1, "device": "cpu"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text(json.dumps(full))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state is not None:
        last = max((line["step"] for line in lines), default=0)
        status = RunStatus(state, "", last, 1.0, 1, 1, (), "here", 0, time.time() - 60)
        (folder / "status.json").write_text(json.dumps(asdict(status if state == "training" else status.end(state))))
    if state == "finished":
        (folder / "final").mkdir()
    return folder
