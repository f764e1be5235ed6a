"""The catalogue of bad input: each fault with the exit code and the words that it must give, and never a traceback.

Faults of recipes, models, the environment and the run directory; faults of data have their own tests under `data/`.
"""

import json
import os
import re
import shutil

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from nesso_tune.run import train
from tests.support.runs import BASE, command, main_here, recipe, sums, write_recipe

MESSAGE = re.compile(r"^.+: .+; .+$", re.DOTALL)


def judged(capsys, arguments, code, *words):
    """Runs a command that must fail, and looks at all that a user sees of it."""
    got, _, said = main_here(capsys, *arguments)
    assert got == code, said
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    assert "internal error" not in said
    assert any(MESSAGE.match(line) for line in said.strip().splitlines()), "where: what; what to do"
    return said


# --- recipes: a short one, and what is done to its text ---

SHORT = """\
method: sft
output_dir: {out}
model: {{base: {base}, random_init: true, dtype: float32}}
data:
  sequence_len: 128
  sources: [{{path: {rows}}}]
train: {{max_steps: 2}}
"""


def adds(text):
    return lambda recipe: recipe + text


def swaps(old, new):
    def swapped(recipe):
        assert old in recipe
        return recipe.replace(old, new)

    return swapped


RECIPES = {
    "an empty file": (lambda _: "", "not nothing"),
    "a list": (lambda _: "- method: sft\n", "a recipe must be a section of keys"),
    "no YAML": (adds("train: {a\n"), "r.yaml:"),
    "a tab": (adds("\ttrain:\n"), "r.yaml:"),
    "two documents": (adds("---\nmethod: dpo\n"), "r.yaml:"),
    "a key twice": (adds("output_dir: other\n"), "output_dir"),
    "no method": (swaps("method: sft\n", ""), "method"),
    "another method": (swaps("method: sft", "method: grpo"), "grpo"),
    "no output_dir": (lambda text: re.sub("output_dir.*\n", "", text), "output_dir"),
    "no sources": (lambda text: re.sub("  sources.*\n", "", text), "data.sources"),
    "sources of none": (lambda text: re.sub("sources: .*", "sources: []", text), "must not be empty"),
    "a misspelt key": (adds("evaluatoin: null\n"), "did you mean `evaluation`?"),
    "a misspelt nested key": (swaps("max_steps", "max_step"), "did you mean `train.max_steps`?"),
    "a key of another tool": (adds("micro_batch_size: 4\n"), "train.micro_batch_size"),
    "a key in the wrong section": (adds("learning_rate: 1e-4\n"), "train.learning_rate"),
    "a number as text": (swaps("max_steps: 2", "max_steps: two"), "a whole number"),
    "a fraction of a step": (swaps("max_steps: 2", "max_steps: 2.5"), "a whole number"),
    "a negative number": (swaps("max_steps: 2", "max_steps: -2"), "max_steps"),
    "yes for true": (swaps("random_init: true", "random_init: yes"), "true or false"),
    "a rate above one": (swaps("max_steps: 2", "learning_rate: 5"), "at most"),
    "a rate that is none": (swaps("max_steps: 2", "learning_rate: .nan"), "learning_rate"),
    "a schedule of another name": (swaps("max_steps: 2", "schedule: {type: cosin}"), "did you mean `cosine`?"),
    "warm-up said twice": (swaps("max_steps: 2", "schedule: {warmup_ratio: 0.1, warmup_steps: 3}"), "contradicts"),
    "a knob that does nothing": (swaps("max_steps: 2", "schedule: {type: constant, min_ratio: 0.1}"), "no effect"),
    "steps and epochs": (swaps("max_steps: 2", "max_steps: 2, num_epochs: 3"), "contradicts"),
    "a score without a column": (swaps("{path: ", "{min_score: 0.5, path: "), "needs score_field"),
    "a DPO section in SFT": (adds("dpo: {beta: 0.1}\n"), "dpo"),
    "a share above one": (swaps("sequence_len: 128", "validation_size: 1.5"), "validation_size"),
    "a token": (swaps("random_init: true", "random_init: true, revision: hf_abcdefghijklmnopqrst0"), "a secret"),
    "a token as a number": (swaps("max_steps: 2", "learning_rate: hf_abcdefghijklmnopqrst0"), "a secret"),
    "a NUL": (lambda text: re.sub("output_dir: .*", 'output_dir: "a\\\\0b"', text), "NUL"),
    "a way out": (lambda text: re.sub("output_dir: .*", "output_dir: ../../x", text), "outside the working directory"),
    "a spike of another kind": (swaps("max_steps: 2", "on_spike: ignore"), "on_spike"),
    "a template that is not there": (adds("chat: {template: chatmll}\n"), "did you mean `chatml`?"),
    "a batch that does not divide": (swaps("max_steps: 2", "global_batch_size: 3, micro_batch_size: 2"), "multiple"),
    "an optimizer that is not there": (swaps("max_steps: 2", "optimizer: adam"), "adamw_torch"),
}


@pytest.mark.parametrize(("change", "words"), RECIPES.values(), ids=RECIPES)
def test_recipes(tmp_path, talks, capsys, change, words):
    path = tmp_path / "r.yaml"
    path.write_text(change(SHORT.format(out=tmp_path / "run", base=BASE, rows=talks)), encoding="utf-8")
    judged(capsys, ["train", path], 2, words)
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_the_short_recipe_itself_is_fine(tmp_path, talks, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(SHORT.format(out=tmp_path / "run", base=BASE, rows=talks), encoding="utf-8")
    assert main_here(capsys, "train", path)[0] == 0


FLAGS = {
    "no such recipe": (["train", "absent.yaml"], 2, "absent.yaml"),
    "a recipe that is nearly shipped": (["check", "quickstart/sftt"], 2, "did you mean"),
    "a folder for a recipe": (["check", "{here}"], 2, "{here}"),
    "bytes that are no text": (["check", "{binary}"], 2, "UTF-8"),
    "an override without a value": (["check", "{r}", "--set", "train.max_steps"], 2, "--set"),
    "an override of nothing": (["check", "{r}", "--set", "train.max_stps=3"], 2, "did you mean `train.max_steps`?"),
    "a checkpoint that is not there": (
        ["train", "{r}", "--resume", "{here}/checkpoint-9"],
        2,
        "does not exist; use auto, never",
    ),
    "a change of no key": (["train", "{r}", "--allow-changes", "train.lr"], 2, "unknown key `train.lr`"),
    "smoke and overwrite": (["train", "{r}", "--smoke", "--overwrite"], 2, "no effect with --smoke"),
    "one folder for two": (["train", "{r}", "{r}"], 2, "has the same output_dir"),
    "a model to talk to that is not there": (["chat", "{here}/nowhere/final"], 4, "no such model folder"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), FLAGS.values(), ids=FLAGS)
def test_the_command_line(tmp_path, talks, capsys, arguments, code, words):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00method")
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    names = {"here": tmp_path, "r": path, "binary": tmp_path / "binary.yaml"}
    judged(capsys, [a.format(**names) for a in arguments], code, words.format(**names))
    assert not (tmp_path / "run").exists()


# --- models: a whole base, and what is done to its folder ---


def edits(name, change):
    def edited(base):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(change(content)))

    return edited


def rewrites(change):
    def rewritten(base):
        weights = load_file(base / "model.safetensors")
        change(weights)
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    return rewritten


def cut(name, keep=100):
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:keep])


def emptied(base):
    for file in base.iterdir():
        file.unlink()


MODELS = {
    "gone": (shutil.rmtree, "no such folder"),
    "an empty folder": (emptied, "the folder is empty"),
    "no configuration": (lambda base: (base / "config.json").unlink(), "has no config.json"),
    "a broken configuration": (cut("config.json", 20), "config.json cannot be read"),
    "a configuration that is a list": (edits("config.json", lambda _: [1]), "config.json cannot be read"),
    "an architecture that nobody knows": (edits("config.json", lambda c: {**c, "model_type": "hal"}), "model.base"),
    "a width that is text": (edits("config.json", lambda c: {**c, "hidden_size": "x"}), "config.json"),
    "a negative width": (edits("config.json", lambda c: {**c, "hidden_size": -4}), "model.base"),
    "no heads": (edits("config.json", lambda c: {**c, "num_attention_heads": 0}), "model.base"),
    "a folder for weights": (
        lambda base: ((base / "model.safetensors").unlink(), (base / "x.safetensors").mkdir()), "has no weights",
    ),
    "no tokenizer": (lambda base: (base / "tokenizer.json").unlink(), "has no tokenizer"),
    "a broken tokenizer": (cut("tokenizer.json"), "tokenizer"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "has no weights"),
    "cut weights": (cut("model.safetensors", 5000), "cannot be loaded"),
    "weights that are text": (lambda base: (base / "model.safetensors").write_text("version https"), "be loaded"),
    "a layer that lacks": (rewrites(lambda w: w.pop("model.norm.weight")), "1 weights are missing from its files"),
    "a layer of another shape": (
        rewrites(lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:3].clone()})), "model.base",
    ),
    "NaN in a layer": (rewrites(lambda w: w["model.norm.weight"].fill_(float("nan"))), "contains NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "words"), MODELS.values(), ids=MODELS)
def test_models(tmp_path, talks, whole_base, capsys, fault, words):
    base = tmp_path / "base"
    shutil.copytree(whole_base, base)
    fault(base)
    some = recipe("sft", tmp_path / "run", [talks], model={"base": str(base), "random_init": False})
    judged(capsys, ["train", write_recipe(tmp_path / "r.yaml", some)], 4, words)
    assert not (tmp_path / "run").exists(), "what was begun for nothing is gone"


# --- the environment ---


ENVIRONMENTS = {
    "processes that are no number": ({"WORLD_SIZE": "two"}, {}, 5, "WORLD_SIZE: is 'two'"),
    "no processes": ({"WORLD_SIZE": "0"}, {}, 5, "WORLD_SIZE"),
    "a number beyond the last": ({"WORLD_SIZE": "2", "RANK": "2"}, {}, 5, "RANK: is 2, but WORLD_SIZE is 2"),
    "a machine's number that is none": ({"LOCAL_WORLD_SIZE": "x"}, {}, 5, "LOCAL_WORLD_SIZE: is 'x'"),
    "a number that is none": ({"RANK": "first"}, {}, 5, "RANK"),
    "several that are told no meeting point": ({"WORLD_SIZE": "2"}, {}, 5, "MASTER_ADDR"),
    "a tracker that is not installed": ({}, {"logging": {"report_to": ["mlflow"]}}, 5, "mlflow is not installed"),
    "an attention kernel that is not installed": (
        {}, {"model": {"attention": "flash", "dtype": "bfloat16"}}, 2, "attention",
    ),
    "a base on a hub that is out of reach": (
        {"HF_HUB_OFFLINE": "1"}, {"model": {"base": "no/such", "random_init": False}}, 5, "cannot be reached",
    ),
    "data on a hub that is out of reach": (
        {"HF_HUB_OFFLINE": "1"}, {"data": {"sources": [{"path": "no/such"}]}}, 5, "cannot be reached",
    ),
    "a cache in a file": ({"NESSO_TUNE_CACHE": "{file}/cache"}, {}, 5, "not a directory"),
    "code of the hub without a commit": (
        {}, {"model": {"base": "some/one", "random_init": False, "trust_remote_code": True}}, 2, "full hash",
    ),
    "bytes for a cache": ({"NESSO_TUNE_CACHE": "/proc/nesso"}, {}, 5, "/proc"),
}  # fmt: skip


@pytest.mark.parametrize(("variables", "sections", "code", "words"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_environments(tmp_path, talks, capsys, monkeypatch, variables, sections, code, words):
    (tmp_path / "file").write_text("in the way")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks], **sections))
    if "WORLD_SIZE" in variables:  # one of several ends by itself, without what runs around it
        done = command("train", path)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    else:
        judged(capsys, ["train", path], code, words)
    assert not (tmp_path / "run").exists()


# --- the run directory: a run that was stopped at step 2 of 4, and what is done to it ---


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run that ended at step 4 as if it had been killed after step 4's checkpoint, before `final/`."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
        train(recipe("sft", folder / "run", [sums(folder)], evaluation=None))
    return folder


def unfinished(run):
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")


def without_manifest_of_checkpoint(run):
    unfinished(run)
    (run / "checkpoint-2" / "manifest.json").unlink()


def without_run_manifest(run):
    unfinished(run)
    (run / "manifest.json").unlink()


def broken_run_manifest(run):
    (run / "manifest.json").write_text("{")


def foreign(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / "thesis.txt").write_text("mine")


def a_file(run):
    shutil.rmtree(run)
    run.write_text("a file")


def changed_row(run):
    unfinished(run)
    rows = run.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Quanto fa 3", "Quanto fa, allora, 3"))


DIRECTORIES = {
    "a foreign folder": (foreign, [], 5, "contains no run of nesso-tune"),
    "a foreign folder, overwritten": (foreign, ["--overwrite"], 5, "nothing was written"),
    "a file": (a_file, [], 5, "is a file"),
    "a run without its manifest": (without_run_manifest, [], 5, "contains no run"),
    "a run with a broken manifest": (broken_run_manifest, [], 5, "is damaged"),
    "no checkpoint that is whole": (without_manifest_of_checkpoint, [], 5, "no checkpoint is usable"),
    "an unfinished run, never resumed": (unfinished, ["--resume", "never"], 5, "contains an unfinished run"),
    "another rate": (unfinished, ["--set", "train.learning_rate=1e-5"], 2, "--allow-changes train.learning_rate"),
    "another batch": (unfinished, ["--set", "train.micro_batch_size=3"], 2, "_size: 2, the recipe now has 3"),
    "another seed": (unfinished, ["--set", "seed=1"], 2, "seed: 42, the recipe now has 1"),
    "another batch, allowed": (
        unfinished, ["--set", "train.micro_batch_size=3", "--allow-changes", "train.micro_batch_size"], 2,
        "the global batch changed (2 -> 3)",
    ),
    "two changes, allowed one by one": (
        unfinished, ["--set", "train.micro_batch_size=1", "--set", "seed=1", "--allow-changes",
                     "train.micro_batch_size", "--allow-changes", "seed"], 2, "the global batch changed (2 -> 1)",
    ),
    "other data": (changed_row, [], 2, "the data changed"),
    "another template": (unfinished, ["--set", "chat.template=llama3"], 2, "chat.template"),
    "a change of a finished run": (
        lambda run: None, ["--set", "seed=1", "--allow-changes", "seed"], 2, "its run is finished",
    ),
    "a checkpoint and overwrite": (
        unfinished, ["--resume", "{run}/checkpoint-2", "--overwrite"], 2, "which --resume names",
    ),
    "a checkpoint of another run": (unfinished, ["--resume", "{run}/../rows.jsonl"], 2, "is not in the output_dir"),
    "a checkpoint of a finished run": (lambda run: None, ["--resume", "{run}/checkpoint-2"], 5, "its run is finished"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "flags", "code", "words"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_run_directories(tmp_path, stopped_run, capsys, fault, flags, code, words):
    shutil.copytree(stopped_run, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    some = recipe("sft", run, [tmp_path / "rows.jsonl"], evaluation=None)
    moved(stopped_run, run)
    fault(run)
    before = kept(run)
    flags = [flag.format(run=run) for flag in flags]
    judged(capsys, ["train", write_recipe(tmp_path / "r.yaml", some), *flags], code, words)
    assert kept(run) == before, "nothing that was there is lost"


def moved(old, run):
    """The copied run as that of its new place."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["recipe"]["output_dir"] = str(run)
    manifest["recipe"]["data"]["sources"][0]["path"] = str(run.parent / "rows.jsonl")
    (run / "manifest.json").write_text(json.dumps(manifest))


def kept(run):
    """Names and sizes of a run's files; a damaged checkpoint that is set aside counts under its own name."""
    if run.is_file():
        return run.read_text()
    files = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run)).removeprefix("damaged-"): path.stat().st_size for path in files}


def test_a_locked_run(tmp_path, talks, capsys):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", tmp_path / "run", [talks]))
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        judged(capsys, ["train", path], 5, "is in use by another nesso-tune process")
    assert os.listdir(tmp_path / "run") in ([".lock"], [])


def test_there_are_enough():
    assert sum(map(len, (RECIPES, FLAGS, MODELS, ENVIRONMENTS, DIRECTORIES))) + 1 >= 60
