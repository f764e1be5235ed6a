"""The loss of `final/` in transformers alone, against the loss in training."""

import ast
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file, save_file

from nesso_tune.errors import ModelError, RunEnvironmentError
from nesso_tune.export import final_folder, plain_loss, verify
from nesso_tune.export.verify import SAMPLE_ROWS, SAMPLE_TOKENS, Verifier, chosen_rows, rounding_limit
from nesso_tune.run import train
from tests.support.runs import main_here, metrics, recipe, steps, sums, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory, whole_base):
    """Runs by kind: the run directory and the arguments with which its `final/` was verified."""
    folder, runs, own = tmp_path_factory.mktemp("verify"), {}, Verifier.verify
    rows = sums(folder)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}?", "chosen": f"Sì, {i}.", "rejected": "Boh."}) + "\n" for i in range(8))
    )
    whole = {"base": whole_base, "random_init": False}
    kinds = {
        "float32": ("sft", rows, {}),
        "bfloat16": ("sft", rows, {"model": {"dtype": "bfloat16"}}),
        "lora": ("sft", rows, {"model": {**whole, "adapter": {"type": "lora", "r": 4}}}),
        "dpo": ("dpo", folder / "pairs.jsonl", {"model": whole}),
    }
    for kind, (method, data, more) in kinds.items():

        def recording(self, folder, model, losses, trust_remote_code, name, kind=kind):
            runs[kind] = model, losses
            return own(self, folder, model, losses, trust_remote_code, name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
            patch.setattr(Verifier, "verify", recording)
            settings = {"train": {"learning_rate": 1e-2}, "data": {"validation_size": 6}, "evaluation": {"samples": 0}}
            train(recipe(method, folder / kind, [data], **{**settings, **more}), verify="all")
    return {kind: (folder / kind, *found) for kind, found in runs.items()}


def verified(folder, model, losses):
    with Verifier("all") as verifier:
        verifier.verify(folder, model, losses, False)
    return verifier.verified


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "lora", "dpo"])
def test_the_last_evaluation_is_that_of_final(trained, kind):
    run, _, losses = trained[kind]
    found = json.loads((run / "manifest.json").read_text())["verified"]
    assert found["rows"] == len(losses.rows)
    assert found["tokens"] == sum(losses.tokens) > 20
    precise = kind != "bfloat16"
    assert abs(found["loss"] - found["loss_in_training"]) < (1e-5 if precise else 0.01)
    if kind != "dpo":
        last = steps(run, "eval_loss")[4]
        assert found["loss_in_training"] == pytest.approx(last, abs=1e-5 if precise else 0.01)
        return
    last = next(line for line in reversed(metrics(run)) if "eval_logps/chosen" in line)
    whole = -(last["eval_logps/chosen"] + last["eval_logps/rejected"]) * found["rows"] / found["tokens"]
    assert found["loss_in_training"] == pytest.approx(whole, abs=1e-5)


def with_rolled_embedding(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, dims=0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_changed_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1.05
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_other_theta(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 500.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [with_rolled_embedding, with_changed_weight, with_other_theta])
@pytest.mark.parametrize("kind", ["float32", "dpo"])
def test_another_model_is_noticed(trained, tmp_path, kind, damage):
    run, model, losses = trained[kind]
    shutil.copytree(run / "final", tmp_path / "final")
    assert verified(tmp_path / "final", model, losses).rows == len(losses.rows)
    damage(tmp_path / "final")
    with pytest.raises(ModelError, match=r"final/: its loss in transformers .* is .*, in training .*--verify none"):
        verified(tmp_path / "final", model, losses)


def test_a_folder_that_transformers_cannot_use(trained, tmp_path):
    run, model, losses = trained["float32"]
    shutil.copytree(run / "final", tmp_path / "final")
    (tmp_path / "final" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"transformers cannot use it \(.*; it was not written"):
        verified(tmp_path / "final", model, losses)


def test_weights_that_are_not_numbers_are_no_match(trained):
    _, _, losses = trained["float32"]
    with pytest.raises(ModelError, match="is nan"):
        losses.compare([math.nan] * len(losses.sequences()), "5")


def test_a_refused_run_keeps_its_checkpoints_and_has_no_final(tmp_path, monkeypatch, capsys):
    own = final_folder.save_model

    def save_model(*arguments):
        own(*arguments)
        with_rolled_embedding(arguments[2])

    monkeypatch.setattr(final_folder, "save_model", save_model)
    some = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [sums(tmp_path)], evaluation=None))
    code, _, said = main_here(capsys, "train", some, "--verify", "all")
    assert (code, "final/: its loss in transformers" in said) == (4, True), said
    assert not [path.name for path in (tmp_path / "run").iterdir() if "final" in path.name]
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is False
    code, _, said = main_here(capsys, "train", some, "--verify", "none")
    assert code == 0, said
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["finished"], manifest["verified"]) == (True, None)


def test_a_larger_model_is_verified_in_a_new_interpreter(trained, monkeypatch):
    run, model, losses = trained["float32"]
    monkeypatch.setattr(verify, "TINY_MODEL", 0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = verified(run / "final", model, losses)
    assert found.largest_difference < 1e-5
    assert found.loss == pytest.approx(json.loads((run / "manifest.json").read_text())["verified"]["loss"], abs=1e-6)


def test_a_killed_process_is_an_error_of_the_environment(trained):
    run, model, losses = trained["float32"]
    with Verifier("all") as verifier:
        os.kill(verifier._process.pid, 9)
        with pytest.raises(RunEnvironmentError, match=r"was killed; check whether the machine ran out of memory"):
            verifier.verify(run / "final", model, losses, False)


def test_without_memory_it_is_not_verified(trained, monkeypatch, caplog):
    run, model, losses = trained["float32"]
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert verified(run / "final", model, losses) is None
    assert "final/ is not verified: this takes" in caplog.text


def test_transformers_is_alone():
    """The code that computes the loss of `final/` imports nothing of ours."""
    tree = ast.parse(Path(plain_loss.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert {"torch", "transformers"} <= names
    assert not [name for name in names if "nesso" in name]


def test_a_sample_is_spread_and_bounded(trained):
    rows = trained["float32"][2].rows
    assert chosen_rows(rows, "all") is rows
    records = np.resize(rows.records, 500)
    many = type(rows)(rows.documents, records, np.arange(501))
    some = chosen_rows(many, "sample")
    assert len(some) == SAMPLE_ROWS
    assert (some.records[0], some.records[-1]) == (records[0], records[-1])
    assert some.token_counts.sum() <= SAMPLE_TOKENS
    long = type(rows)(rows.documents, np.resize(rows.records, 2000), np.array([0, 1000, 2000]))
    assert len(chosen_rows(long, "sample")) == 1, "one row, however long"


def test_limits_of_rounding():
    assert rounding_limit(1, precise=True) == rounding_limit(10**6, precise=True) == 1e-4
    assert rounding_limit(100, precise=False) == pytest.approx(0.012)
    assert rounding_limit(10**6, precise=False) == 0.003
