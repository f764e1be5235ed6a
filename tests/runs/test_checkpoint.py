"""Checkpoints: complete or refused, with canonical names, and resumed bit for bit."""

import json
import math
import shutil
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file, save_file

from nesso_tune import RecipeError, RunEnvironmentError
from nesso_tune.run import train
from nesso_tune.runs import checkpoint
from nesso_tune.runs.checkpoint import MANIFEST, checkpoints, read_manifest
from nesso_tune.training.sft import ConversationTrainer
from nesso_tune.training.state_dict import get_rng_state, set_rng_state
from tests.support.logs import logged, without_steps
from tests.support.runs import main_here, metrics, recipe, several, steps, sums, thorough, write_recipe

FILES = ["counters-0.json", MANIFEST, "model.safetensors", "optimizer.safetensors", "rng-0.json", "trainer_state.json"]


DAMAGES = ["deleted", "truncated", "one bit flipped"]


class Stopped(Exception):
    """Ends a run in the middle."""


@pytest.fixture
def stop_at(monkeypatch):
    """Makes runs fail before optimizer step N; 0 lets them finish."""
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


def test_content_of_a_checkpoint(tmp_path, talks):
    result = train(recipe("sft", tmp_path / "run", [talks]))
    newest, older = checkpoints(tmp_path / "run")
    assert (newest.name, older.name) == ("checkpoint-4", "checkpoint-2")
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    manifest = read_manifest(newest)
    assert (manifest["step"], manifest["world_size"], manifest["threads"]) == (4, 1, 1)
    last = [line for line in metrics(tmp_path / "run") if "tokens" in line][-1]
    for name in ("tokens", "supervised_tokens"):
        assert manifest[name] == last[name]
    assert manifest["epoch"] == pytest.approx(last["epoch"], abs=1e-4)
    assert {"base", "data", "tokenizer", "recipe_hash"} <= set(manifest)
    weights, final = load_file(newest / "model.safetensors"), load_file(result.model_dir / "model.safetensors")
    assert set(weights) == set(final), "canonical names, tied weights once"
    optimizer = load_file(newest / "optimizer.safetensors")
    assert {name.split("|")[0] for name in optimizer} == set(weights)
    assert not list(newest.glob("*.pt")) + list(newest.glob("*.bin")), "nothing is pickled"


# each file once and each kind of damage twice; by hand all of them
@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(name, damage, marks=() if (i + j) % 3 == 0 else thorough)
     for i, name in enumerate(FILES) for j, damage in enumerate(DAMAGES)],
)  # fmt: skip
def test_a_damaged_file_leads_to_the_previous_checkpoint_and_the_same_bits(tmp_path, one_run, name, damage, capsys):
    """From the command line: the previous checkpoint is used and named; the model equals that of an undamaged run."""
    rows = one_run.parent / "rows.jsonl"
    run = tmp_path / "run"
    shutil.copytree(one_run, run)
    shutil.rmtree(run / "final")
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["recipe"]["output_dir"] = str(run)
    (run / MANIFEST).write_text(json.dumps(manifest))
    damaged(run / "checkpoint-4" / name, damage)
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", run, [rows], evaluation=None))
    code, _, said = main_here(capsys, "train", path)
    assert code == 0, said
    assert "checkpoint-4: " in said
    assert "set aside as damaged-checkpoint-4" in said
    assert "resuming an unfinished run from checkpoint-2" in said
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one_run, run))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A sharded checkpoint of two processes."""
    folder = tmp_path_factory.mktemp("shards")
    some = recipe("sft", folder / "run", [sums(folder)], evaluation=None, train={"micro_batch_size": 1},
                  distributed={"fsdp": "full_shard", "state_dict": "sharded"})  # fmt: skip
    done = several("train", write_recipe(folder / "r.yaml", some), NESSO_TUNE_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder / "run" / "checkpoint-4"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_sharded_checkpoint_is_detected(tmp_path, shards, damage):
    names = sorted(path.name for path in shards.iterdir())
    assert len([name for name in names if name.startswith("shard-")]) >= 2
    assert {"rng-0.json", "rng-1.json", "counters-0.json", "counters-1.json"} <= set(names)
    for name in names:
        copy = tmp_path / name / "checkpoint-4"
        shutil.copytree(shards, copy)
        read_manifest(copy)
        damaged(copy / name, damage)
        with pytest.raises(ValueError, match=r"missing|damaged|altered"):
            read_manifest(copy)


def damaged(file, how):
    content = file.read_bytes()
    if how == "deleted":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[:-7])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A finished run, read only."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        train(recipe("sft", folder / "run", [sums(folder)], evaluation=None))
    return folder / "run"


def test_resume_is_bit_identical(tmp_path, talks, stop_at):
    plan = {"max_steps": 9, "gradient_accumulation_steps": 2, "schedule": {"warmup_steps": 2}}
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


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 6})
    interrupted(some, stop_at, 6)
    run = tmp_path / "run"
    (run / "checkpoint-4" / "optimizer.safetensors").unlink()
    with logged() as said:
        train(some)
    assert "checkpoint-4: optimizer.safetensors is missing" in said[0]
    assert said[1] == "resuming an unfinished run from checkpoint-2"
    assert {"step": 2, "event": "resumed"} in metrics(run)
    assert (run / "damaged-checkpoint-4").is_dir()


def test_a_chosen_checkpoint_takes_precedence_over_later_ones(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 8})
    interrupted(some, stop_at, 8)
    run = tmp_path / "run"
    stop_at(5)
    with pytest.raises(Stopped):
        train(some, resume=str(run / "checkpoint-4"))
    stop_at(0)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-4", "checkpoint-2"]
    assert (run / "later-checkpoint-6").is_dir()
    with logged() as said:
        train(some)
    assert without_steps(said) == ["resuming an unfinished run from checkpoint-4"]


def test_a_finished_run_with_other_data_or_a_damaged_final(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks])
    final = train(some).model_dir / "model.safetensors"
    whole = final.read_bytes()
    final.write_bytes(whole[:-9])
    with logged() as said:
        assert train(some).trained
    assert "final/ is missing or damaged" in said[0]
    assert final.read_bytes() == whole
    with open(talks, "a", encoding="utf-8") as file:
        turns = [{"role": "user", "content": "Ancora?"}, {"role": "assistant", "content": "Ancora."}]
        file.write(json.dumps({"messages": turns, "lang": "it"}) + "\n")
    with pytest.raises(RecipeError, match="the data changed"):
        train(some)


def test_without_a_usable_checkpoint_the_run_is_refused(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 6})
    interrupted(some, stop_at, 4)
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    with pytest.raises(RunEnvironmentError, match="no checkpoint is usable"):
        train(some)
    assert train(some, overwrite=True).trained


def test_a_changed_recipe_is_refused_with_both_values(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks])
    interrupted(some, stop_at, 4)
    other = recipe("sft", tmp_path / "run", [talks], train={"learning_rate": 5e-4, "weight_decay": 0.1})
    with pytest.raises(RecipeError, match=r"train\.learning_rate: 0\.001, the recipe now has 0\.0005") as error:
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


def test_logging_and_checkpoint_sections_may_change(tmp_path, talks, stop_at):
    interrupted(recipe("sft", tmp_path / "run", [talks]), stop_at, 4)
    other = recipe("sft", tmp_path / "run", [talks], logging={"every_steps": 2}, checkpoint={"keep": 1})
    assert train(other).trained
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_rng_states_round_trip_through_json():
    import random

    import numpy as np

    states = json.loads(json.dumps(get_rng_state()))
    drawn = [random.random(), np.random.rand(), float(torch.rand(1))]
    set_rng_state(states)
    assert [random.random(), np.random.rand(), float(torch.rand(1))] == drawn


def test_resume_in_another_environment_is_accepted_and_reported(tmp_path, talks, stop_at):
    """Another number of threads and another library version: reported and recorded with both values."""
    some = recipe("sft", tmp_path / "run", [talks])
    interrupted(some, stop_at, 4)
    folder = tmp_path / "run" / "checkpoint-2"
    body = {key: value for key, value in read_manifest(folder).items() if key != "self"}
    body |= {"threads": 7, "versions": {**body["versions"], "torch": "1.0.0"}}
    (folder / MANIFEST).write_text(json.dumps({**body, "self": checkpoint.json_sha256(body)}))
    with logged() as said:
        assert train(some).trained
    (note,) = [text for text in said if "may not be bit-identical" in text]
    assert "CPU threads 7 -> 1" in note
    assert f"torch 1.0.0 -> {version('torch')}" in note
    resumed = next(line for line in metrics(tmp_path / "run") if line.get("event") == "resumed")
    assert resumed["environment"] == {"CPU threads": [7, 1], "torch": ["1.0.0", version("torch")]}


def test_resume_in_the_same_environment_reports_no_difference(tmp_path, talks, stop_at):
    some = recipe("sft", tmp_path / "run", [talks])
    interrupted(some, stop_at, 4)
    with logged() as said:
        train(some)
    assert without_steps(said) == ["resuming an unfinished run from checkpoint-2"]


def test_pruning_keeps_the_checkpoint_written_last(tmp_path):
    for step in (2, 4, 900):  # the last one of another run, copied here
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.prune(tmp_path, 1, tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-900"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_reference_that_was_altered_is_refused(tmp_path, pairs, damage):
    from nesso_tune.training.reference import REFERENCE_FILE, load_reference, save_reference

    scores = {i: (-1.5 * i, -2.5 * i) for i in range(200)}
    save_reference(tmp_path, scores, "x")
    assert load_reference(tmp_path, "x") == scores
    damaged(tmp_path / REFERENCE_FILE, damage)
    with pytest.raises(RunEnvironmentError, match=r"is missing|is damaged"):
        load_reference(tmp_path, "x")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("model.safetensors", "the base model's weights changed"),
        ("tokenizer.json", "the tokenizer or template changed"),
    ],
)
def test_another_base_or_tokenizer_is_refused(tmp_path, talks, whole_base, stop_at, what, says):
    base = tmp_path / "base"
    shutil.copytree(whole_base, base)
    some = recipe("sft", tmp_path / "run", [talks], model={"base": str(base), "random_init": False})
    interrupted(some, stop_at, 4)
    if what == "model.safetensors":
        weights = load_file(base / what)
        weights["model.norm.weight"][0] += 1
        save_file(weights, base / what, metadata={"format": "pt"})
    else:
        content = json.loads((base / what).read_text())
        content["model"]["vocab"] = {
            {"zz": "qq"}.get(token, token): i for token, i in content["model"]["vocab"].items()
        }
        content["added_tokens"] = content["added_tokens"][:-1]
        (base / what).write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=says):
        train(some)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path):
    for content in ({"a": 1, "b": 2}, {"b": 3}):
        writer = checkpoint.CheckpointWriter(tmp_path, 4)
        writer.begin()
        for name, value in content.items():
            writer.write_json(f"{name}.json", value)
        written = writer.finish({"step": 4}, writer.file_records())
    assert read_manifest(written)["files"].keys() == {"b.json"}
    assert sorted(path.name for path in written.iterdir()) == ["b.json", MANIFEST]
    assert json.loads((written / "b.json").read_text()) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
