"""A run goes on at another number of processes with exactly the rows that are left, and at the same to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune.run import train
from tests.support.runs import metrics, recipe, several, steps, thorough, write_recipe


def rows_read(file):
    return [int(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "first", "second", "state"),
    [("sft", 2, 1, "sharded"),
     *(pytest.param(*case, marks=thorough) for case in (("sft", 1, 2, "sharded"), ("sft", 2, 2, "sharded"),
                                                        ("dpo", 1, 2, "full"),
                                                        ("sft", 2, 4, "sharded"),
                                                        ("dpo", 2, 1, "full"), ("dpo", 2, 2, "full")))],
)  # fmt: skip
def test_a_run_goes_on_at_another_number_of_processes(tmp_path, request, method, first, second, state):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    batch = {"micro_batch_size": 1, "global_batch_size": 4, "gradient_accumulation_steps": None}
    sections = {"train": {**batch, "max_steps": 6}, "checkpoint": {"every_steps": 3}, "evaluation": {"every_steps": 2},
                "distributed": {"fsdp": "full_shard", "state_dict": state}}  # fmt: skip
    whole = recipe(method, tmp_path / "whole", [source], **sections)
    train(whole)
    path = write_recipe(tmp_path / "r.yaml", recipe(method, tmp_path / "run", [source], **sections))
    final, finals = tmp_path / "run" / "final" / "model.safetensors", []
    logs = [tmp_path / name for name in ("first", "second")]
    for log, processes in zip(logs, (first, second), strict=True):
        done = several("train", path, module="tests.support.recording", processes=processes, ROWS_READ=str(log))
        assert done.returncode == 0, done.stderr[-3000:]
        finals.append(load_file(final))
        if log == logs[0]:  # as if it had been killed after step 3
            shutil.rmtree(tmp_path / "run" / "final")
            shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert sorted(rows_read(logs[0])) == list(range(24)), "each row of the run once"
    assert sorted(rows_read(logs[1])) == list(range(12, 24)), "none twice, none left out"
    resumed = next(line for line in metrics(tmp_path / "run") if line.get("event") == "resumed")
    assert resumed.get("environment", {}) == ({} if first == second else {"processes": [first, second]})
    for key in ("loss", "loss/it", "eval_loss", "tokens", "supervised_tokens", "learning_rate"):
        assert steps(tmp_path / "run", key) == pytest.approx(steps(tmp_path / "whole", key), abs=1e-5), key
    for name, weight in finals[0].items():  # to the bit where nothing else changed
        torch.testing.assert_close(finals[1][name], weight, rtol=0, atol=0 if first == second else 1e-4)
