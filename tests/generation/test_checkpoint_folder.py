"""A checkpoint is read like the model of its run, or the error names a command that makes a model of it."""

import shutil

import pytest
import torch

from nesso_tune import ModelError
from nesso_tune.export import parity
from nesso_tune.generation.inference import find_model_folder, load_chat_model, model_digest
from nesso_tune.run import train
from tests.support.runs import main_here, recipe, several, sums, write_recipe


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(parity, "PROMPTS", 8)
    monkeypatch.setattr(parity, "ANSWER_TOKENS", 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, whole_base):
    """Finished runs: of all weights, and of an adapter."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = {"base": whole_base, "random_init": False}
    for name, adapter in (("whole", None), ("lora", {"type": "lora", "r": 4})):
        model = {**base, "adapter": adapter, "dtype": "bfloat16"}
        train(recipe("sft", folder / name, [sums(folder)], model=model, evaluation=None))
    return folder


def test_a_checkpoint_has_the_tokenizer_and_the_precision_of_its_run(runs):
    last, final = (load_chat_model(str(runs / "whole" / name)) for name in ("checkpoint-4", "final"))
    ids = torch.arange(20, 60)[None]
    assert torch.equal(last._model(ids).logits, final._model(ids).logits)
    assert last._tokenizer.chat_template == final._tokenizer.chat_template
    assert last._model.generation_config.to_dict() == final._model.generation_config.to_dict()
    first = load_chat_model(str(runs / "whole" / "checkpoint-2"))
    assert not torch.equal(first._model(ids).logits, final._model(ids).logits)


def test_checkpoints_are_different_models(runs):
    folders = [find_model_folder(str(runs / "whole" / f"checkpoint-{step}")) for step in (2, 4)]
    assert len({model_digest(folder) for folder in folders}) == 2
    assert not list(folders[0].glob("optimizer*")), "is no part of the model"


def test_verbs_take_checkpoints(runs, write_rows, tmp_path, capsys):
    checkpoint = runs / "whole" / "checkpoint-2"
    prompts = write_rows([{"prompt": "Quanto fa 2 + 1?", "language": "it"}], "p.jsonl")
    for command in (
        ("chat", checkpoint, "--prompt", "Ciao", "--max-new-tokens", "2"),
        ("eval", checkpoint, "--prompts", prompts, "--max-new-tokens", "2"),
        ("generate", checkpoint, "--prompts", prompts, "-o", tmp_path / "a.jsonl", "--max-new-tokens", "2"),
    ):
        code, _, said = main_here(capsys, *command)
        assert code == 0, said


def test_a_checkpoint_of_a_refused_model_is_read_with_its_candidate(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    (tmp_path / "run" / "final").rename(tmp_path / "run" / "candidate")
    assert load_chat_model(str(tmp_path / "run" / "checkpoint-2"))


def test_the_checkpoint_of_an_unfinished_run_is_the_model_that_the_finished_run_reads(runs, tmp_path, capsys):
    shutil.copytree(runs / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    of_unfinished, of_finished = (
        load_chat_model(str(folder / "checkpoint-2")) for folder in (tmp_path / "run", runs / "whole")
    )
    ids = torch.arange(20, 60)[None]
    assert torch.equal(of_unfinished._model(ids).logits, of_finished._model(ids).logits)
    assert of_unfinished._model.dtype == torch.bfloat16
    assert of_unfinished._tokenizer.chat_template == of_finished._tokenizer.chat_template
    assert of_unfinished._model.generation_config.to_dict() == of_finished._model.generation_config.to_dict()
    code, _, said = main_here(capsys, "chat", tmp_path / "run" / "checkpoint-4", "--prompt", "Ciao")
    assert code == 0, said


def test_the_adapter_of_an_unfinished_run_waits_for_its_end(runs, tmp_path):
    shutil.copytree(runs / "lora", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(ModelError, match=r"checkpoint-2: is a checkpoint that has the weights of an adapter only; fin"):
        load_chat_model(str(tmp_path / "run" / "checkpoint-2"))


def exported_as_said(checkpoint, why, folder, capsys):
    """Runs the command that the error names, and chats with its result."""
    code, _, said = main_here(capsys, "chat", checkpoint, "--prompt", "Ciao")
    assert (code, f"is a checkpoint that {why}" in said) == (4, True), said
    command = said.split("`")[1].replace("FOLDER", str(folder)).split()
    assert main_here(capsys, *command[1:])[0] == 0
    return main_here(capsys, "chat", folder, "--prompt", "Ciao", "--max-new-tokens", "2")[0]


def test_the_checkpoint_of_an_adapter_is_exported_first(runs, tmp_path, capsys):
    assert (
        exported_as_said(runs / "lora" / "checkpoint-2", "has the weights of an adapter", tmp_path / "a", capsys) == 0
    )


def test_a_sharded_checkpoint_is_exported_first(tmp_path, whole_base, port, capsys):
    base = {"base": whole_base, "random_init": False}
    some = recipe("sft", tmp_path / "run", [sums(tmp_path)], evaluation=None, model=base,
                  distributed={"fsdp": "full_shard", "state_dict": "sharded"})  # fmt: skip
    done = several("train", write_recipe(tmp_path / "r.yaml", some), "--verify", "none")
    assert done.returncode == 0, done.stderr
    assert exported_as_said(tmp_path / "run" / "checkpoint-2", "has its weights in shards", tmp_path / "a", capsys) == 0
