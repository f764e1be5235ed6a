"""A save in the step of an evaluation, and training after it, under FSDP: groups of weights end their forward pass."""

import pytest

from nesso_tune.run import train
from tests.support.runs import recipe, several, steps, thorough, write_recipe


@pytest.mark.parametrize("method", [pytest.param("sft", marks=thorough), "dpo"])
def test_training_goes_on_after_an_evaluation_in_the_step_of_a_save(tmp_path, request, method):
    """Before torch 2.13, FSDP2 leaves the group of a tied head unsharded after a pass without gradients."""
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    sections = {
        "train": {"micro_batch_size": 1, "global_batch_size": 4, "gradient_accumulation_steps": None, "max_steps": 4},
        "checkpoint": {"every_steps": 1},
        "distributed": {"fsdp": "full_shard"},
        "evaluation": {"every_steps": 1, "samples": 0},  # generation runs the head too
    }
    train(recipe(method, tmp_path / "alone", [source], **sections))
    path = write_recipe(tmp_path / "r.yaml", recipe(method, tmp_path / "run", [source], **sections))
    done = several("train", path)
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "eval_loss"):
        assert steps(tmp_path / "run", key) == pytest.approx(steps(tmp_path / "alone", key), abs=1e-5), key
