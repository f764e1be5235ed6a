"""`micro_batch_size: auto` on a device that has less memory than planned, and what a resumed run keeps."""

import json

import pytest
import torch

from nesso_tune.errors import RunEnvironmentError
from nesso_tune.planning.hardware import GIB, Gpu
from nesso_tune.planning.plan import World
from nesso_tune.planning.planner import make_plan
from nesso_tune.run import train
from nesso_tune.runs.provenance import RunFacts
from nesso_tune.training.memory_probe import probe_micro_batch
from nesso_tune.training.sft import ConversationTrainer
from tests.support.logs import logged
from tests.support.runs import loaded, main_here, metrics, recipe, several, steps, thorough, write_recipe
from tests.support.small_gpu import limit_rows, small_gpu

AUTO = {"micro_batch_size": "auto", "global_batch_size": 8}
DROPOUT = {"adapter": {"type": "lora", "r": 4, "dropout": 0.1}, "random_init": False}


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_pass_finds_what_fits_and_changes_nothing(tmp_path, request, method, checkpointing):
    source = request.getfixturevalue("talks" if method == "sft" else "pairs")
    some = recipe(method, tmp_path / "run", [source], train={**AUTO, "gradient_checkpointing": checkpointing})
    data, model = loaded(some)
    plan = make_plan(some, World(1, Gpu("large", 80 * GIB)), data.volume)
    assert plan.micro_batch == 8
    longest = int(data.train.token_counts.max())
    limit_rows(model, 3, longest)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    training = model.training
    with logged() as messages:
        found = probe_micro_batch(model, some, data, plan)
    assert (found.micro_batch, found.accumulation, found.global_batch) == (2, 4, 8)
    assert found.memory.total < plan.memory.total
    assert [message.split(" (")[0] for message in messages] == [
        "micro batch auto: no memory for 8 rows", "micro batch auto: no memory for 4 rows"
    ]  # fmt: skip
    assert found.micro_batch_reason == "a test of one pass ran out of memory with 8 rows"
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training is training
    assert "forward" not in model.__dict__
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not model.get_input_embeddings()._forward_hooks


def test_what_fits_stays_and_not_even_one_row_is_an_error(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], train=AUTO)
    data, model = loaded(some)
    plan = make_plan(some, World(1, Gpu("large", 80 * GIB)), data.volume)
    assert probe_micro_batch(model, some, data, plan) is plan
    limit_rows(model, 0)
    with pytest.raises(RunEnvironmentError, match="CUDA out of memory") as error:
        probe_micro_batch(model, some, data, plan)
    assert "set train.gradient_checkpointing: true, lower data.sequence_len" in str(error.value)
    assert "lower train.micro_batch_size" not in str(error.value), "one row is the least"


def test_any_other_error_is_no_lack_of_memory(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], train=AUTO)
    data, model = loaded(some)

    def fail(*_):
        raise RuntimeError("a bug")

    model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        probe_micro_batch(model, some, data, make_plan(some, World(1, Gpu("large", 80 * GIB)), data.volume))
    assert "forward" not in model.__dict__


def test_a_sharded_model_is_left_to_the_plan(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], train=AUTO, distributed={"fsdp": "full_shard"})
    data, model = loaded(some)
    limit_rows(model, 0)
    plan = make_plan(some, World(2, Gpu("large", 80 * GIB)), data.volume)
    with logged() as messages:
        assert probe_micro_batch(model, some, data, plan) is plan
    assert "a sharded model is not probed" in messages[0]


@pytest.mark.parametrize(
    "model", [pytest.param({}, marks=thorough, id="all weights"), pytest.param(DROPOUT, id="an adapter with dropout")]
)
def test_a_run_after_the_test_is_the_run_of_that_micro_batch(tmp_path, talks, whole_base, model):
    sections = {"model": {**model, "base": whole_base}} if model else {}
    runs = {}
    for name, size in (("auto", "auto"), ("said", 2)):
        some = recipe("sft", tmp_path / name, [talks], train={**AUTO, "micro_batch_size": size}, **sections)
        with small_gpu(rows=2), logged() as messages:
            train(some)
        runs[name] = (
            steps(tmp_path / name),
            steps(tmp_path / name, "grad_norm"),
            manifest(tmp_path / name)["micro_batch"],
        )
        assert any("no memory for 8 rows" in message for message in messages) is (size == "auto")
    assert runs["auto"] == runs["said"]
    assert runs["auto"][2] == 2


class Stopped(Exception):
    """Stands for a run that ends in the middle."""


def train_to_step_3(some, monkeypatch, rows):
    """Leaves a run with a checkpoint of step 2."""
    original = ConversationTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == 3:
            raise Stopped
        return original(self, *arguments)

    with monkeypatch.context() as patch, small_gpu(rows):
        patch.setattr(ConversationTrainer, "training_step", training_step)
        with pytest.raises(Stopped):
            train(some)


def test_a_resumed_run_keeps_its_micro_batch_also_on_a_smaller_gpu(tmp_path, talks, monkeypatch, capsys):
    some = recipe("sft", tmp_path / "run", [talks], train=AUTO)
    train_to_step_3(some, monkeypatch, rows=4)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (manifest(checkpoint)["micro_batch"], manifest(checkpoint)["fsdp"]) == (4, "none")
    path = write_recipe(tmp_path / "r.yaml", some)
    with small_gpu(rows=2, memory=GIB):  # no second choice, but an error that says what to do
        code, _, err = main_here(capsys, "train", path)
    assert code == 5
    assert "out of memory: CUDA out of memory" in err
    assert "lower train.micro_batch_size (now 4, by auto)" in err
    assert "name the changed keys with --allow-changes" in err
    with small_gpu(rows=4, memory=GIB), logged() as messages:
        train(some)
    assert any("4 x 2 rows per process and step (kept from the start of the run)" in message for message in messages)
    assert manifest(tmp_path / "run")["micro_batch"] == 4
    assert sorted(steps(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_number_may_become_auto_and_is_kept(tmp_path, talks, monkeypatch):
    """A run of an earlier version, whose manifest has no record, with its recipe as it is shipped now."""
    said = recipe("sft", tmp_path / "run", [talks], train={**AUTO, "micro_batch_size": 2})
    to_dict = RunFacts.to_dict
    with monkeypatch.context() as patch:
        unknown = ("micro_batch", "fsdp")
        patch.setattr(RunFacts, "to_dict", lambda facts: {k: v for k, v in to_dict(facts).items() if k not in unknown})
        train_to_step_3(said, monkeypatch, rows=8)
    assert "micro_batch" not in manifest(tmp_path / "run" / "checkpoint-2")
    with small_gpu(rows=8), logged() as messages:
        train(recipe("sft", tmp_path / "run", [talks], train=AUTO))
    assert manifest(tmp_path / "run")["micro_batch"] == 2
    assert not any("bit-identical" in message for message in messages)


def test_ranks_with_different_gpus_make_the_same_plan(tmp_path, talks):
    """Each by itself, they would cut the rows of a step into micro batches of another size."""
    runs = []
    for name, memory in (("equal", "1.38,1.38"), ("different", "64,1.38")):
        some = recipe("sft", tmp_path / name, [talks], train={**AUTO, "max_steps": 2}, evaluation=None)
        path = write_recipe(tmp_path / "r.yaml", some)
        done = several("train", path, module="tests.support.small_gpu", ROWS_OF_RANK="99,99", MEMORY_OF_RANK=memory)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [(line["loss"], line["tokens"]) for line in metrics(tmp_path / name) if "loss" in line]
        runs.append((lines, manifest(tmp_path / name)["micro_batch"]))
    assert runs[0] == runs[1]
    assert runs[0][1] < 4, "the large GPU alone takes 4"


def test_all_ranks_take_what_the_smallest_has_memory_for(tmp_path, talks):
    some = recipe("sft", tmp_path / "run", [talks], train={**AUTO, "max_steps": 2}, evaluation=None)
    path = write_recipe(tmp_path / "r.yaml", some)
    done = several("train", path, module="tests.support.small_gpu", ROWS_OF_RANK="4,2")
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = manifest(tmp_path / "run")
    assert (recorded["micro_batch"], recorded["world_size"], recorded["fsdp"]) == (2, 2, "none")
    assert "no memory for 4 rows (on another rank): trying 2" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
