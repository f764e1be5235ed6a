"""Exports as model folder and adapter, and averages: equal to the live model, checked, and never half-written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nesso_tune.run
from nesso_tune.errors import ModelError, RecipeError, RunEnvironmentError
from nesso_tune.export import exporter, parity
from nesso_tune.export.exporter import export
from nesso_tune.export.folder_formats import ADAPTER, HF
from nesso_tune.export.weights import FinishedRun
from nesso_tune.run import train
from tests.support.runs import main_here, recipe, several, sums, write_recipe

IDS = torch.arange(20, 60)[None]


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(parity, "PROMPTS", 8)
    monkeypatch.setattr(parity, "ANSWER_TOKENS", 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, whole_base):
    """Finished runs by kind, each with the logits of the model that was in training."""
    folder, runs = tmp_path_factory.mktemp("exports"), {}
    rows, own = sums(folder), nesso_tune.run.gather_final_model

    def make(kind, adapter, **model):
        def recording(live, *rest):
            with torch.no_grad():
                runs[kind] = FinishedRun.open, live.eval()(input_ids=IDS).logits
            return own(live, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NESSO_TUNE_CACHE", str(folder / "cache"))
            patch.setattr(nesso_tune.run, "gather_final_model", recording)
            section = {"base": whole_base, "random_init": False, "adapter": adapter, **model}
            train(recipe("sft", folder / kind, [rows], model=section, evaluation=None, train={"learning_rate": 1e-2}))
        return FinishedRun.open(folder / kind), runs[kind][1]

    return {
        "whole": make("whole", None, dtype="bfloat16"),
        "lora": make("lora", {"type": "lora", "r": 4}),
        "dora": make("dora", {"type": "dora", "r": 4}),
    }


@torch.no_grad()
def logits(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


def weights_of(folder):
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_and_separate_adapters_equal_the_live_model(trained, tmp_path, kind):
    run, live = trained[kind]
    merged = export(run, HF, folder=tmp_path / "hf")
    torch.testing.assert_close(logits(merged.folder), live, rtol=0, atol=1e-5)
    adapter = export(run, ADAPTER, folder=tmp_path / "adapter")
    assert not list(adapter.folder.glob("model*.safetensors"))
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(run.recipe.model.base).resolve())
    torch.testing.assert_close(logits(adapter.folder, AutoPeftModelForCausalLM), live, rtol=0, atol=1e-5)
    for done in (merged, adapter):
        assert done.parity.positions > 8
        assert (done.folder / "chat_template.jinja").read_bytes() == (run.final / "chat_template.jinja").read_bytes()


def test_the_code_in_the_card_of_an_adapter_gives_a_model_that_stops(trained, tmp_path, monkeypatch):
    """peft does not read the end tokens of the folder."""
    run, _ = trained["lora"]
    folder = export(run, ADAPTER, folder=tmp_path / "adapter", checked=False).folder
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, found := {})
    expected = json.loads((run.final / "generation_config.json").read_text())["eos_token_id"]
    assert found["model"].generation_config.eos_token_id == expected


def test_float32_of_a_bfloat16_run_has_the_weights_before_rounding(trained, tmp_path):
    run, _ = trained["whole"]
    done = export(run, HF, "float32", folder=tmp_path / "hf", checked=False)
    masters = weights_of(run.final_checkpoint)
    exported = weights_of(done.folder)
    assert all(torch.equal(exported[name], masters[name]) for name in exported)
    assert any(not torch.equal(exported[name], weight) for name, weight in weights_of(run.final).items())
    default = export(run, HF, folder=tmp_path / "default", checked=False)
    assert (default.dtype, default.parity) == ("bfloat16", None)
    assert weights_of(default.folder).keys() == weights_of(run.final).keys()


def test_averages_of_checkpoints_and_of_a_model_with_its_parent(trained, tmp_path, whole_base):
    run, _ = trained["whole"]
    done = export(run, HF, "float32", "last:2", tmp_path / "checkpoints")
    assert done.parts == [str(run.path / "checkpoint-4"), str(run.path / "checkpoint-2")]
    first, last = (weights_of(run.path / f"checkpoint-{step}") for step in (2, 4))
    for name, weight in weights_of(done.folder).items():
        torch.testing.assert_close(weight, (first[name] + last[name]) / 2, rtol=0, atol=1e-6)
    done = export(run, HF, "float32", f"final,{whole_base}", tmp_path / "parent")
    final, parent = weights_of(run.final), weights_of(Path(whole_base))
    for name, weight in weights_of(done.folder).items():
        torch.testing.assert_close(weight, (final[name] + parent[name]) / 2, rtol=0, atol=1e-6)


def test_adapters_are_merged_before_they_are_averaged(trained, tmp_path):
    run, _ = trained["lora"]
    each = [export(run, HF, None, f"checkpoint-{step}", tmp_path / str(step), checked=False) for step in (2, 4)]
    mean = export(run, HF, None, "checkpoint-2,checkpoint-4", tmp_path / "mean", checked=False)
    first, last = (weights_of(done.folder) for done in each)
    for name, weight in weights_of(mean.folder).items():
        torch.testing.assert_close(weight, (first[name] + last[name]) / 2, rtol=0, atol=1e-6)
    assert torch.equal(logits(each[1].folder), logits(run.final))


def test_shards_are_consolidated(tmp_path, whole_base, port):
    base = {"base": whole_base, "random_init": False}
    some = recipe("sft", tmp_path / "run", [sums(tmp_path)], evaluation=None, model=base,
                  distributed={"fsdp": "full_shard", "state_dict": "sharded"})  # fmt: skip
    done = several("train", write_recipe(tmp_path / "r.yaml", some), "--verify", "sample")
    assert done.returncode == 0, done.stderr
    run = FinishedRun.open(tmp_path / "run")
    assert list((run.path / "checkpoint-4").glob("shard-*.safetensors"))
    assert run.manifest["verified"]["largest_difference"] < 1e-5, "the live model and final/"
    exported = export(run, HF, averaged="checkpoint-4", folder=tmp_path / "hf", checked=False)
    torch.testing.assert_close(logits(exported.folder), logits(run.final), rtol=0, atol=1e-5)


def test_another_answer_stops_the_export(trained, tmp_path, capsys):
    run, _ = trained["lora"]

    def write(run, model, folder, dtype):
        HF.write(run, model, folder, dtype)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, dims=0).contiguous()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    broken = exporter.Format(**{**vars(HF), "write": write})
    with pytest.raises(ModelError, match=r"answers differently at token \d+ of its answer to '.*': \d+ instead of \d+"):
        export(run, broken, folder=tmp_path / "new" / "hf")
    assert not (tmp_path / "new").exists()


def test_another_prompt_stops_the_export(trained, tmp_path):
    run, _ = trained["lora"]

    def write(run, model, folder, dtype):
        HF.write(run, model, folder, dtype)
        template = (folder / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text("Ciao " + template)

    with pytest.raises(ModelError, match="encodes a prompt differently: token 0 is"):
        export(run, exporter.Format(**{**vars(HF), "write": write}), folder=tmp_path / "hf")


def test_prompts_are_of_two_languages_with_and_without_system_message_and_tools():
    asked = [(prompt.messages, prompt.tools) for prompt in parity.prompts(supports_tools=True)]
    kinds = {(messages[0]["role"] == "system", tools is not None) for messages, tools in asked}
    assert kinds == {(a, b) for a in (False, True) for b in (False, True)}
    assert all(prompt.tools is None for prompt in parity.prompts(supports_tools=False))


@pytest.fixture
def beside_its_base(trained, whole_base, tmp_path, monkeypatch):
    """A run whose recipe names its base relative to the working directory."""
    shutil.copytree(trained["lora"][0].path, tmp_path / "run")
    shutil.copytree(whole_base, tmp_path / "base")
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace(f"base: {whole_base}", "base: base"))
    monkeypatch.chdir(tmp_path)
    return FinishedRun.open(tmp_path / "run")


def test_an_adapter_loads_from_every_directory(trained, beside_its_base, tmp_path, monkeypatch):
    assert beside_its_base.recipe.model.base == "base"
    done = export(beside_its_base, ADAPTER)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(done.folder, AutoPeftModelForCausalLM), trained["lora"][1], rtol=0, atol=1e-5)


def test_an_adapter_that_loads_in_one_directory_only_stops_the_export(beside_its_base, tmp_path):
    def write(run, model, folder, dtype):
        ADAPTER.write(run, model, folder, dtype)
        text = (folder / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(text.replace(str(tmp_path / "base"), "base"))

    with pytest.raises(ModelError, match="names its base by the relative path base"):
        export(beside_its_base, exporter.Format(**{**vars(ADAPTER), "write": write}))


def test_an_adapter_of_a_local_base_is_listed_but_not_uploaded(beside_its_base, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    text = (beside_its_base.path / "recipe.yaml").read_text()
    text = text.replace("license: null", "license: mit").replace("citation: null", "citation: Rossi")
    (beside_its_base.path / "recipe.yaml").write_text(text)
    options = ("--to", "adapter", "--unchecked", "--push", "--repo", "a/b")
    code, listed, said = main_here(capsys, "export", "run", *options)
    assert (code, "adapter_model.safetensors" in listed) == (0, True), said
    problem = listed.splitlines()[-1]
    assert problem.startswith("adapter_config.json: the base is the local folder base, so nobody else can load")
    code, listed, said = main_here(capsys, "export", "run", *options, "--yes")
    assert (code, problem in said) == (2, True), said


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"dtype": "q8_0"}, RecipeError, "--dtype: q8_0 is not a precision of --to hf; use one of float32"),
    ({"averaged": "last:9"}, RecipeError, "has 2 checkpoints, not 9; write last:2"),
    ({"averaged": "last:x"}, RecipeError, "has no number"),
    ({"averaged": "last:1"}, RecipeError, "is one checkpoint, not .* write last:2 or more, or checkpoint-4 to export"),
    ({"averaged": "final,checkpoint-2,checkpoint-2"}, RecipeError, "checkpoint-2 is named twice; name each model once"),
    ({"averaged": "final, checkpoint-2, {run}"}, RecipeError, "final is named twice"),
    ({"averaged": "checkpoint-5"}, RecipeError, "no checkpoint checkpoint-5 .* did you mean checkpoint-4"),
    ({"averaged": "final,,final"}, RecipeError, "has an empty name"),
    ({"averaged": "nowhere"}, ModelError, "no such checkpoint, run or model folder"),
    ({"format": ADAPTER}, ModelError, "trained all weights, without an adapter; use --to hf"),
    ({"format": ADAPTER, "dtype": "float32"}, RecipeError, "--dtype: has no effect on --to adapter"),
])  # fmt: skip
def test_wrong_options(trained, tmp_path, options, error, message):
    run, _ = trained["whole"]
    options = {name: v.replace("{run}", str(run.path)) if name == "averaged" else v for name, v in options.items()}
    with pytest.raises(error, match=message):
        export(run, options.pop("format", HF), folder=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_of_another_shape_are_not_averaged(trained, tmp_path):
    run, _ = trained["whole"]
    config = AutoModelForCausalLM.from_pretrained(run.final).config
    config.hidden_size = 96
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    with pytest.raises(RecipeError, match=r"has another shape .*; average models of the same base"):
        export(run, HF, averaged=f"final,{tmp_path / 'small'}", folder=tmp_path / "out")


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.1), ("rope_theta", 77.0)])
def test_models_that_compute_something_else_are_not_averaged(trained, tmp_path, key, value):
    """With weights of the same shapes."""
    run, _ = trained["whole"]
    shutil.copytree(run.final, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (config["rope_parameters"] if key == "rope_theta" else config)[key] = value
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RecipeError, match=r"has another (rms_norm_eps|rope_\w+) than .*; average models of the same base"
    ):
        export(run, HF, averaged=f"final,{tmp_path / 'other'}", folder=tmp_path / "out")


def test_what_another_tool_notes_in_a_configuration_is_no_other_computation(trained, tmp_path):
    run, _ = trained["whole"]
    shutil.copytree(run.final, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "another_tool_version": "2026.1"}))
    done = export(run, HF, averaged=f"final,{tmp_path / 'other'}", folder=tmp_path / "out", checked=False)
    assert len(done.parts) == 2


def test_an_adapter_whose_base_has_changed_is_not_merged_into_it(trained, tmp_path, whole_base):
    run, _ = trained["lora"]
    base = tmp_path / "base"
    shutil.copytree(whole_base, base)
    recipe_text = (run.path / "recipe.yaml").read_text()
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe_text.replace(str(whole_base), str(base)))
    moved = FinishedRun.open(tmp_path / "run")
    export(moved, ADAPTER, folder=tmp_path / "same", checked=False)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    for format, averaged in ((ADAPTER, None), (HF, "last:2")):
        with pytest.raises(ModelError, match=r"model.base .*: has other weights or settings than when the adapter"):
            export(moved, format, averaged=averaged, folder=tmp_path / "out", checked=False)
    export(moved, HF, folder=tmp_path / "out", checked=False)


def test_weights_too_large_for_float16_stop_the_export(trained, tmp_path):
    run, _ = trained["whole"]
    shutil.copytree(run.path, tmp_path / "run")
    file = tmp_path / "run" / "final" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"model.layers.0.mlp.up_proj.weight does not fit into float16; use --dtype bf16"
    ):
        export(FinishedRun.open(tmp_path / "run"), HF, "float16", folder=tmp_path / "out", checked=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json",
                                  "generation_config.json", "chat_template.jinja"])  # fmt: skip
def test_damaged_files_of_the_same_size_are_named(trained, tmp_path, capsys, name):
    run, _ = trained["whole"]
    shutil.copytree(run.path, tmp_path / "run")
    file = tmp_path / "run" / "final" / name
    content = file.read_bytes()
    file.write_bytes(b"\xff" * min(3000, len(content)) + content[3000:])
    code, _, said = main_here(capsys, "export", tmp_path / "run", "--unchecked", "-o", tmp_path / "out")
    assert (code, f"final/{name}: is damaged (" in said) == (4, True), said
    assert not (tmp_path / "out").exists()


def test_a_link_and_the_working_directory_are_folders(trained, tmp_path, monkeypatch):
    run, _ = trained["whole"]
    for name in ("disk", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(run, HF, folder=tmp_path / "link", checked=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "here")
    export(run, HF, folder=Path("."), checked=False)
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_folders_of_others_stay(trained, tmp_path, monkeypatch):
    run, _ = trained["whole"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    later, reserved = run.path / "checkpoint-9" / "x", run.path / "candidate"
    inside = [run.final / "x", run.path / "checkpoint-4" / "x", trained["lora"][0].path / "checkpoint-2" / "x"]
    for folder in (tmp_path / "mine", run.path, run.final, *inside, later, reserved):
        with pytest.raises(RunEnvironmentError, match=r"is not empty and contains no export|is a folder of the run"):
            export(run, HF, folder=folder)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunEnvironmentError, match=r"the export needs .* are free; free some space"):
        export(run, HF, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_an_earlier_one_and_goes_with_its_run(trained, tmp_path, capsys):
    run, _ = trained["whole"]
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    for _ in range(2):
        code, _, said = main_here(capsys, "export", copy, "--unchecked")
        assert code == 0, said
        assert "not checked" in said
        (copy / "export" / "hf" / "stale.bin").touch()
    from nesso_tune.runs.layout import run_files

    assert copy / "export" in run_files(copy), "--overwrite moves it aside"


def test_a_folder_that_cannot_be_written_to_asks_for_another_one(trained, tmp_path, monkeypatch, capsys):
    run, _ = trained["whole"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # /sys has none, which is another error
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "export").symlink_to("/sys")  # read-only for root too
    code, _, said = main_here(capsys, "export", tmp_path / "run", "--unchecked")
    assert code == 5
    assert re.search(r"export/hf: cannot be created \(.*\); name a folder that you can write to with -o FOLDER", said)


@pytest.mark.parametrize("verb", ["export", "card"])
def test_what_belongs_to_a_run_names_the_run(trained, tmp_path, capsys, verb):
    run, _ = trained["whole"]
    code, _, said = main_here(capsys, verb, run.path / "checkpoint-4")
    assert code == 5
    assert f"checkpoint-4: is a checkpoint, not a run directory; name {run.path}; `nesso-tune export {run.path}" in said
    file = write_recipe(tmp_path / "small.yaml", run.recipe)
    code, _, said = main_here(capsys, verb, file)
    assert (code, f"is a recipe, not a run directory; name its run directory {run.path}" in said) == (5, True), said
    code, _, said = main_here(capsys, verb, "quickstart/sft")
    assert "name its run directory outputs/quickstart/sft" in said
    (tmp_path / "notes.txt").touch()
    code, _, said = main_here(capsys, verb, tmp_path / "notes.txt")
    assert "notes.txt: is not a run directory; name the output_dir of a finished run" in said


def test_an_unfinished_run_is_not_exported(trained, tmp_path, capsys):
    run, _ = trained["whole"]
    assert main_here(capsys, "export", tmp_path / "nowhere")[0] == 5
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "final" / "model.safetensors").write_bytes(b"short")
    code, _, said = main_here(capsys, "export", copy)
    assert (code, "missing or have another size" in said) == (4, True)
    shutil.rmtree(copy / "final")
    code, _, said = main_here(capsys, "export", copy)
    assert (code, "has no final/: the run is not finished" in said) == (5, True)
    (copy / "candidate" / "evaluations").mkdir(parents=True)
    (copy / "candidate" / "evaluations" / "not-worse.gate.json").touch()
    code, _, said = main_here(capsys, "export", copy)
    assert (code, "has no final/: its gate refused the model" in said) == (5, True)
