"""Checkpoints: whole or refused, canonical in their names, enough to go on to the bit."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.run import train
from nesso_tune.training.checkpoint import MANIFEST, checkpoints, read_manifest
from nesso_tune.training.randomness import random_states, set_random_states
from nesso_tune.training.sft import ConversationTrainer
from tests.support.runs import metrics, recipe, steps

FILES = ["counters-0.json", MANIFEST, "model.safetensors", "optimizer.safetensors", "rng-0.json", "trainer_state.json"]


class Stopped(Exception):
    """Stands for a run that ends in the middle."""


@pytest.fixture
def stop_at(monkeypatch):
    """Makes runs die before optimizer step N; 0 lets them live."""
    original, limit = ConversationTrainer.training_step, [0]

    def step(self, *arguments, **options):
        if limit[0] and self.state.global_step + 1 == limit[0]:
            raise Stopped
        return original(self, *arguments, **options)

    monkeypatch.setattr(ConversationTrainer, "training_step", step)
    return lambda n: limit.__setitem__(0, n)


def interrupted(some, stop_at, step):
    stop_at(step)
    with pytest.raises(Stopped):
        train(some)
    stop_at(0)


def test_a_checkpoint_holds_what_it_says(tmp_path, talks):
    result = train(recipe("sft", tmp_path / "run", [talks]))
    newest, older = checkpoints(tmp_path / "run")
    assert (newest.name, older.name) == ("checkpoint-4", "checkpoint-2")
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    manifest = read_manifest(newest)
    assert manifest["step"] == 4
    weights, final = load_file(newest / "model.safetensors"), load_file(result.model_dir / "model.safetensors")
    assert set(weights) == set(final), "canonical names, tied weights once"
    optimizer = load_file(newest / "optimizer.safetensors")
    assert {name.split("|")[0] for name in optimizer} == set(weights)
    assert not list(newest.glob("*.pt")) + list(newest.glob("*.bin")), "nothing is pickled"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["deleted", "truncated", "one bit flipped"])
def test_damage_to_any_file_is_seen(tmp_path_factory, name, damage, one_run):
    import shutil

    copy = tmp_path_factory.mktemp("copy") / "checkpoint-4"
    shutil.copytree(one_run / "checkpoint-4", copy)
    read_manifest(copy)
    file = copy / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-7])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"missing|damaged|altered"):
        read_manifest(copy)


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """One finished run that tests only read."""
    folder = tmp_path_factory.mktemp("one")
    rows = [{"prompt": f"Quanto fa {i} + 1?", "response": f"Fa {i + 1}.", "lang": "it"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        train(recipe("sft", folder / "run", [folder / "rows.jsonl"], evaluation=None))
    return folder / "run"


def test_a_run_that_stopped_goes_on_to_the_bit(tmp_path, talks, stop_at):
    plan = {"max_steps": 9, "gradient_accumulation_steps": 2, "schedule": {"warmup_steps": 2, "constant_ratio": 0.8}}
    sections = {"train": plan, "checkpoint": {"every_steps": 3}, "logging": {"every_steps": 2}}
    whole = recipe("sft", tmp_path / "whole", [talks], **sections)
    train(whole)
    broken = recipe("sft", tmp_path / "broken", [talks], **sections)
    interrupted(broken, stop_at, 6)
    assert not (tmp_path / "broken" / "final").exists()
    train(broken)
    for file in ("final/model.safetensors", "checkpoint-9/optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / file) for run in ("whole", "broken"))
        assert all(torch.equal(a[name], b[name]) for name in a)
    for key in ("loss", "loss/it", "loss/en", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "epoch",
                "eval_loss", "eval_loss/it"):  # fmt: skip
        assert steps(tmp_path / "broken", key) == steps(tmp_path / "whole", key), key
    assert {"step": 3, "event": "resumed"} in metrics(tmp_path / "broken")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 6})
    interrupted(some, stop_at, 6)
    run = tmp_path / "run"
    (run / "checkpoint-4" / "optimizer.safetensors").unlink()
    said = []
    train(some, say=said.append)
    assert "checkpoint-4: optimizer.safetensors is missing" in said[0]
    assert said[1] == "an unfinished run: it continues from checkpoint-2"
    assert {"step": 2, "event": "resumed"} in metrics(run)
    assert (run / "damaged-checkpoint-4").is_dir()


def test_a_chosen_checkpoint_wins_over_later_ones(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 8})
    interrupted(some, stop_at, 8)
    run = tmp_path / "run"
    stop_at(5)
    with pytest.raises(Stopped):
        train(some, resume=str(run / "checkpoint-4"))
    stop_at(0)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    assert (run / "later-checkpoint-6").is_dir()
    said = []
    train(some, say=said.append)
    assert said == ["an unfinished run: it continues from checkpoint-4"]


def test_a_finished_run_is_not_done_for_other_data_or_a_damaged_final(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    final = train(some).model_dir / "model.safetensors"
    whole = final.read_bytes()
    final.write_bytes(whole[:-9])
    said = []
    assert train(some, say=said.append).trained
    assert "final/ is missing or damaged" in said[0]
    assert final.read_bytes() == whole
    with open(talks, "a", encoding="utf-8") as file:
        file.write('{"prompt": "Ancora?", "response": "Ancora.", "lang": "it"}\n')
    with pytest.raises(RecipeError, match="the data changed"):
        train(some)


def test_without_a_usable_checkpoint_the_run_is_refused(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 6})
    interrupted(some, stop_at, 4)
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(RunEnvironmentError, match="no checkpoint is usable"):
        train(some)
    assert train(some, overwrite=True).trained


def test_what_changed_is_named_and_refused(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks])
    interrupted(some, stop_at, 4)
    other = recipe("sft", tmp_path / "run", [talks], train={"learning_rate": 5e-4, "weight_decay": 0.1})
    with pytest.raises(RecipeError, match=r"train\.learning_rate: 0\.001, the recipe now says 0\.0005") as error:
        train(other)
    assert len(error.value.problems) == 2
    with pytest.raises(RecipeError, match=r"weight_decay"):
        train(other, allow_changes=("train.learning_rate",))
    assert train(other, allow_changes=("train.learning_rate", "train.weight_decay")).trained
    rates = steps(tmp_path / "run", "learning_rate")
    assert rates[4] == pytest.approx(5e-4 * 0.5 * (1 + math.cos(math.pi * 3 / 4))), "the new rate, not the old one"
    resumed = next(line for line in metrics(tmp_path / "run") if line.get("event") == "resumed")
    assert resumed["changed"] == {"train.learning_rate": [1e-3, 5e-4], "train.weight_decay": [0.0, 0.1]}
    assert train(other).trained is False, "the accepted recipe is now the run's own"


def test_changed_data_is_refused(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks])
    interrupted(some, stop_at, 4)
    with open(talks, encoding="utf-8") as file:
        text = file.read()
    with open(talks, "w", encoding="utf-8") as file:
        file.write(text.replace("azzurro", "azzurra"))
    with pytest.raises(RecipeError, match="the data changed"):
        train(some)


def test_logging_and_saving_may_change(tmp_path, talks, stop_at):
    interrupted(recipe("sft", tmp_path / "run", [talks]), stop_at, 4)
    other = recipe("sft", tmp_path / "run", [talks], logging={"every_steps": 2}, checkpoint={"keep": 1})
    assert train(other).trained
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_random_states_survive_a_file():
    import random

    import numpy as np

    states = json.loads(json.dumps(random_states()))
    drawn = [random.random(), np.random.rand(), float(torch.rand(1))]
    set_random_states(states)
    assert [random.random(), np.random.rand(), float(torch.rand(1))] == drawn
