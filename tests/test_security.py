"""Nothing foreign runs, nothing escapes, nothing leaks, and nothing goes out that a recipe did not ask for."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nesso_tune import ModelError, RecipeError
from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.secrets import secret_kind
from nesso_tune.run import train
from nesso_tune.runs.checkpoint import checkpoints, read_manifest
from tests.support.runs import ROOT, command, main_here, metrics, recipe, write_recipe

CANARIES = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARY0001",
    "WANDB_API_KEY": "0123456789abcdefcafe0123456789abcdefcafe",
    "AWS_SECRET_ACCESS_KEY": "canary/of/the/cloud/0002",
    "OPENAI_API_KEY": "sk-proj-canaryCANARYcanary0003",
}


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def plant(folder, mark):
    """Pickles under every name that a library is known to load."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth",
                 "pytorch_model.bin", "scaler.pt", "adapter_model.bin"):  # fmt: skip
        with (folder / name).open("wb") as file:
            pickle.dump(Bomb(mark), file)


def files_below(*folders):
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def test_secrets_of_the_environment_are_written_nowhere(tmp_path, talks, whole_base, capsys, monkeypatch):
    """A run and what it leaves, runs that fail, `check`, `prepare`: none says what the environment holds."""
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    run = tmp_path / "run"
    some = recipe("sft", run, [talks], model={"base": whole_base, "random_init": False}, train={"max_steps": 2})
    path = write_recipe(tmp_path / "r.yaml", some)
    first = command("train", path)  # in a process of its own, as it is started
    assert first.returncode == 0, first.stderr
    said = [first.stdout + first.stderr]
    for arguments in (("check", path), ("prepare", path), ("train", path, "--debug", "--set", "seed=2"),
                      ("train", path, "--set", "model.base=nowhere/final", "--debug")):  # fmt: skip
        _, out, err = main_here(capsys, *arguments)
        said.append(out + err)
    for name, secret in CANARIES.items():
        assert all(secret not in text for text in said), name
        leaks = [file for file in files_below(run, tmp_path / "cache") if secret.encode() in file.read_bytes()]
        assert not leaks, name


@pytest.mark.parametrize("secret", filter(secret_kind, CANARIES.values()))  # the others are told by a variable's name
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path, talks, capsys, secret):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    code, out, said = main_here(capsys, "train", path, "--set", f"model.revision={secret}")
    assert code == 2
    assert "looks like a secret" in said
    assert secret not in out + said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "HF_TOKEN"])
def test_a_job_file_holds_no_secret(tmp_path, talks, name):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    settings = {f"cluster.env.{name}": "x"}
    if name == "HF_TOKEN":
        with pytest.raises(RecipeError, match=r"cluster\.env.*is a secret"):
            load_recipe(path, settings)
    else:
        load_recipe(path, settings)


def test_pickles_in_a_checkpoint_are_never_opened(tmp_path, talks):
    mark = tmp_path / "ran"
    some = recipe("sft", tmp_path / "run", [talks], train={"max_steps": 4})
    final = load_file(train(some).model_dir / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    plant(tmp_path / "run" / "checkpoint-2", mark)
    plant(tmp_path / "run", mark)
    again = load_file(train(some).model_dir / "model.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert not mark.exists()
    assert not list((tmp_path / "run" / "final").glob("*.bin")), "nothing foreign is published"


def test_a_base_of_pickles_is_refused(tmp_path, talks, base):
    mark, folder = tmp_path / "ran", tmp_path / "poisoned"
    shutil.copytree(base, folder)
    plant(folder, mark)
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)"):
        train(recipe("sft", tmp_path / "run", [talks], model={"base": str(folder), "random_init": False}))
    assert not mark.exists()


def test_chat_opens_no_pickles_and_runs_no_code_of_a_model(tmp_path, talks, capsys, monkeypatch):
    mark = tmp_path / "ran"
    final = train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 1}, evaluation=None)).model_dir
    plant(final, mark)
    assert main_here(capsys, "chat", final, "--prompt", "Ciao", "--max-new-tokens", "2")[0] == 0
    config = json.loads((final / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (final / "config.json").write_text(json.dumps(config))
    (final / "code.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(0)\n")
    code, _, said = main_here(capsys, "chat", final, "--prompt", "Ciao")
    assert (code, "cannot be loaded" in said) == (4, True)
    some = recipe("sft", tmp_path / "other", [talks], model={"base": str(final), "random_init": False})
    code, _, said = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some))
    assert code == 4, said
    assert not mark.exists()


@pytest.mark.parametrize("revision", [None, "main", "abc1234"])
def test_code_from_the_hub_runs_only_of_a_full_commit(tmp_path, talks, capsys, revision):
    model = {"base": "someone/strange", "random_init": False, "trust_remote_code": True, "revision": revision}
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], model=model))
    for verb in ("check", "train"):
        code, _, said = main_here(capsys, verb, path)
        assert code == 2
        assert "model.trust_remote_code: would run code of someone/strange" in said
        assert "full hash (40 hex digits) of a commit" in said
    code, _, said = main_here(capsys, "check", path, "--set", f"model.revision={'a1' * 20}")
    assert code == 0, said


def test_a_template_that_never_ends(tmp_path, talks, capsys):
    """A foreign model's own template: it is rendered in a sandbox, and in a time."""
    final = train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 1}, evaluation=None)).model_dir
    config = json.loads((final / "tokenizer_config.json").read_text())
    ours = [key for key in config if "nesso" in key]
    assert ours, "by this key a model carries its template's spec; without it the Jinja text is used"
    (final / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ours}))
    loops = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
    (final / "chat_template.jinja").write_text(loops)
    code, _, said = main_here(capsys, "chat", final, "--prompt", "Ciao")
    assert code == 4
    assert "its chat template did not finish within 10 s" in said
    (final / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    code, _, said = main_here(capsys, "chat", final, "--prompt", "Ciao")
    assert code == 4
    assert "its chat template failed" in said


@pytest.mark.parametrize("folder", ["../../escaped", "outputs/../../escaped", ".."])
def test_an_output_folder_does_not_lead_out_of_the_working_directory(tmp_path, talks, capsys, folder):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    code, _, said = main_here(capsys, "train", path, "--set", f"output_dir={folder}")
    assert code == 2
    assert "is outside the working directory" in said


def test_a_manifest_does_not_lead_out_of_its_checkpoint(tmp_path, talks):
    from nesso_tune.runs import checkpoint

    train(recipe("sft", tmp_path / "run", [talks], train={"max_steps": 2}, evaluation=None))
    (whole,) = checkpoints(tmp_path / "run")
    (tmp_path / "run" / "outside.json").write_text("{}")
    manifest = read_manifest(whole)
    body = {key: value for key, value in manifest.items() if key != "self"}
    body["files"]["../outside.json"] = {"size": 2, "sha256": checkpoint.sha256(tmp_path / "run" / "outside.json")}
    (whole / "manifest.json").write_text(json.dumps({**body, "self": checkpoint.json_sha256(body)}))
    with pytest.raises(ValueError, match="names a file outside"):
        read_manifest(whole)


def test_nothing_goes_out_that_a_recipe_did_not_ask_for(tmp_path, talks, pairs, whole_base):
    """SFT, DPO and a chat with local files, where every way out is noted and shut."""
    sft = recipe("sft", tmp_path / "sft", [talks], model={"base": whole_base, "random_init": False})
    dpo = recipe(
        "dpo", tmp_path / "dpo", [pairs], model={"base": str(tmp_path / "sft" / "final"), "random_init": False}
    )
    paths = [write_recipe(tmp_path / f"{some.method}.yaml", some) for some in (sft, dpo)]
    log = tmp_path / "ways-out.txt"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CI"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WAYS_OUT": str(log)}
    for arguments in (["check", *paths[:1]], ["train", *paths], ["chat", str(tmp_path / "dpo"), "--prompt", "Ciao",
                      "--max-new-tokens", "2"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "tests.support.shut_in", *arguments], capture_output=True,
                              text=True, cwd=ROOT, env=environment, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not log.exists(), log.read_text()
    assert metrics(tmp_path / "dpo")


def test_the_way_out_would_be_noted(tmp_path):
    log = tmp_path / "ways-out.txt"
    code = "import tests.support.shut_in, socket; socket.getaddrinfo('huggingface.co', 443)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WAYS_OUT": str(log)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 1
    assert "huggingface.co" in log.read_text()
