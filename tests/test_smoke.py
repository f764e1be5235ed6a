"""`--smoke`: every built-in recipe runs offline and writes only its own folder."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from nesso_tune.errors import DataError, ModelError
from nesso_tune.planning.shapes import KNOWN_CONFIGS, known_config
from nesso_tune.recipes import load_recipe
from nesso_tune.recipes.builtin import shipped_recipes
from nesso_tune.smoke import MAX_SEQUENCE_LEN, ROWS_PER_SOURCE, STEPS, build_tiny_model, smoke_recipe, tiny_config
from tests.support.logs import logged
from tests.support.runs import main_here, metrics, recipe, thorough, write_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory and an empty hub cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


BY_HAND = ("open-zagreus",)  # the shape and the method of `sft`


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=thorough if name in BY_HAND else ()) for name in shipped_recipes()]
)
def test_every_shipped_recipe(name, capsys, elsewhere):
    run = elsewhere / f"{load_recipe(name).output_dir}-smoke"
    code, _, err = main_here(capsys, "train", name, "--smoke")
    assert code == 0, err
    assert "alarm" not in err, "of a model with random weights"
    assert max(line["step"] for line in metrics(run)) == STEPS
    assert [path.name for path in run.parent.iterdir() if path.is_dir()] == [run.name], "the real run is untouched"
    code, out, err = main_here(capsys, "chat", run / "final", "--prompt", "Ciao!", "--max-new-tokens", "4")
    assert code == 0, err
    assert out.endswith("\n")


def test_a_chain_uses_its_own_result_and_starts_from_scratch_each_time(capsys, elsewhere):
    lines: list[dict] = []
    for flags in (["--json-logs"], ["--quiet"]):
        code, out, err = main_here(capsys, "train", "quickstart/sft", "quickstart/dpo", "--smoke", *flags)
        assert code == 0, err
        assert "unfinished" not in err
        assert "this run is finished" not in err
        assert "in place of outputs" not in err, "DPO starts from the result of SFT"
        lines = [json.loads(line) for line in err.splitlines()] if flags == ["--json-logs"] else lines
    assert (out, err) == ("", ""), "nothing to warn of"
    steps = [line for line in lines if line.get("recipe") == "quickstart/dpo" and line["message"].startswith("step ")]
    assert [(line["step"], line["total_steps"]) for line in steps][:2] == [(1, 4), (2, 4)]
    (end,) = [line for line in lines if line["message"].startswith("finished: 4 steps in ") and "logps/chosen" in line]
    assert end["report"] == "outputs/quickstart/dpo-smoke/report.html"
    noted = json.loads((elsewhere / "outputs/quickstart/dpo-smoke/manifest.json").read_text())
    assert noted["recipe"]["model"]["base"] == "outputs/quickstart/sft-smoke/final"


def test_only_sizes_and_lengths_are_reduced(talks):
    some = recipe(
        "sft", "run", [talks], chat={"template": "llama3", "default_system": "Sii breve."}, seed=7,
        data={"sequence_len": 9000, "validation_size": 5000, "roles_to_train": ["user"], "packing": False},
        train={"max_steps": None, "num_epochs": 9, "micro_batch_size": 8, "global_batch_size": 64, "weight_decay": 0.3,
               "schedule": {"type": "linear", "warmup_steps": 100}},
    )  # fmt: skip
    with logged() as said:
        small = smoke_recipe(some, {})
    assert (small.output_dir, small.seed, small.chat) == ("run-smoke", 7, some.chat)
    assert (small.data.sequence_len, small.data.packing, small.data.roles_to_train) == (
        MAX_SEQUENCE_LEN,
        False,
        ("user",),
    )
    assert small.data.sources[0].path == talks
    assert small.data.sources[0].max_rows == ROWS_PER_SOURCE["sft"]
    train = small.train
    assert (train.max_steps, train.num_epochs, train.micro_batch_size, train.weight_decay) == (STEPS, None, 2, 0.3)
    assert (train.schedule.type, train.schedule.warmup_steps) == ("linear", 1)
    assert any(talks in line for line in said)
    assert any("in place of" in line for line in said)


def test_bundled_rows_replace_what_is_not_available(talks):
    some = recipe("sft", "run", [talks, "someone/never-fetched", "someone/neither"])
    with logged() as said:
        small = smoke_recipe(some, {})
    names = [source.path.rsplit("/", 1)[-1] for source in small.data.sources]
    assert names == ["talks.jsonl", "conversations.jsonl", "toolcalls.jsonl"]
    assert sum("using bundled rows instead" in line for line in said) == 2


def test_errors_of_the_real_run_are_errors_here(talks, base, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        smoke_recipe(recipe("sft", "run", ["absent/rows.jsonl"]), {})
    for model, says in (
        ({"base": str(tmp_path / "nowhere")}, "no such folder"),
        ({"base": base, "random_init": False}, "has no weights"),
        ({"base": str(tmp_path)}, "has no config.json|empty"),
    ):
        with pytest.raises(ModelError, match=says):
            smoke_recipe(recipe("sft", "run", [talks], model=model), {})


def test_options_without_effect_are_refused(capsys):
    for option in (["--overwrite"], ["--resume", "never"], ["--allow-changes", "seed"]):
        code, _, err = main_here(capsys, "train", "sft", "--smoke", *option)
        assert code == 2
        assert f"{option[0]}: has no effect with --smoke" in err


def test_a_base_with_weights_keeps_its_tokenizer_and_shape(talks, base, tmp_path, capsys):
    """In place of a local base: the same architecture and tokenizer, other weights."""
    config = AutoConfig.for_model(**known_config("Qwen/Qwen3-0.6B-Base") | {"vocab_size": 1900, "num_hidden_layers": 3})
    folder = tmp_path / "big"
    with torch.device("cpu"):
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / base / name).read_bytes())
    some = recipe("sft", "run", [talks], model={"base": str(folder), "random_init": False, "adapter": {"r": 4}})
    code, _, err = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some), "--smoke")
    assert code == 0, err
    assert "(qwen3; its own tokenizer" in err
    made = json.loads((tmp_path / "run-smoke/final/config.json").read_text())
    assert (made["model_type"], made["vocab_size"], made["num_hidden_layers"]) == ("qwen3", 1900, 2)


@pytest.mark.parametrize("name", sorted({config[0] for config in KNOWN_CONFIGS.values()}))
def test_tiny_models_are_tiny_and_of_their_architecture(name, tmp_path):
    config = next(known_config(base) for base in KNOWN_CONFIGS if KNOWN_CONFIGS[base][0] == name)
    assert build_tiny_model(tmp_path, tiny_config(config, 100)) == name
    weights = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) < 200_000
    made = json.loads((tmp_path / "config.json").read_text())
    grouped = config["num_key_value_heads"] < config["num_attention_heads"]
    assert (made["num_key_value_heads"] < made["num_attention_heads"]) is grouped
    assert made["tie_word_embeddings"] is config["tie_word_embeddings"]


LONG = {"type": "longrope", "long_factor": [1.0] * 48}
KINDS = ["sliding_attention"] * 5 + ["full_attention"]
ODD = {
    "unknown": {"model_type": "never-heard-of", "auto_map": {"AutoConfig": "x.Y"}},
    "long rope": {"model_type": "phi3", "num_attention_heads": 32, "rope_scaling": LONG},
    "layer kinds": {"model_type": "gemma3_text", "layer_types": KINDS, "sliding_window": 8},
    "nothing": {},
}


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_tiny_models_of_unusual_architectures(config, tmp_path):
    kind = build_tiny_model(tmp_path, tiny_config(config, 100))
    assert kind in ("llama", config.get("model_type"))
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_real_run_is_never_overwritten(talks, tmp_path):
    from nesso_tune.errors import RunEnvironmentError
    from nesso_tune.run import train

    train(recipe("sft", tmp_path / "run-smoke", [talks], train={"max_steps": 1}, evaluation=None))
    with pytest.raises(RunEnvironmentError, match="holds a run that is not a smoke run"):
        smoke_recipe(recipe("sft", tmp_path / "run", [talks]), {})
    assert smoke_recipe(recipe("sft", f"{tmp_path}/other/.", [talks]), {}).output_dir == f"{tmp_path}/other-smoke"


ELSEWHERE = {"base": "a/b", "random_init": False}
EARLY = {"max_steps": 10**4, "schedule": {"warmup_steps": 9, "constant_ratio": 0.2, "min_ratio": 0.1}}
SETTINGS = {
    "a long warm-up, nothing held out or evaluated, no end token": {
        "train": EARLY, "data": {"validation_size": 0, "train_on_eos": "none", "packing": False}, "evaluation": None,
    },
    "too long is an error, a padding token of the base": {
        "data": {"sequence_len": 64, "too_long": "error"}, "chat": {"pad_token": "<|pad|>"}, "model": ELSEWHERE,
    },
}  # fmt: skip


@pytest.mark.parametrize("sections", SETTINGS.values(), ids=SETTINGS)
def test_unusual_valid_recipes_run(talks, tmp_path, capsys, sections):
    path = write_recipe(tmp_path / "r.yaml", recipe("sft", "run", [talks], **sections))
    code, _, err = main_here(capsys, "train", path, "--smoke")
    assert code == 0, err


def test_sorted_and_sparse_sources_run(talks, tmp_path, capsys, write_rows, chats):
    scored = write_rows([{**row, "score": 0.1} for row in chats], "scored.jsonl")
    sources = [{"path": talks, "weight": 0.001}, {"path": scored, "min_score": 0.9, "score_field": "score"}]
    some = recipe("sft", "run", [talks], data={"sources": sources})
    code, _, err = main_here(capsys, "train", write_recipe(tmp_path / "r.yaml", some), "--smoke")
    assert code == 0, err


@pytest.mark.parametrize(
    ("config", "says"),
    [({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
     ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "multimodal"),
     ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"), ([], "cannot be read")],
)  # fmt: skip
def test_unsupported_architectures_are_refused(talks, tmp_path, base, capsys, config, says):
    from nesso_tune.errors import ModelError

    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((tmp_path / base / "tokenizer.json").read_bytes())
    some = recipe("sft", "run", [talks], model={"base": str(folder)})
    with pytest.raises(ModelError, match=says):
        smoke_recipe(some, {})
    for verb in ("check", "train"):
        code, _, err = main_here(capsys, verb, write_recipe(tmp_path / "r.yaml", some))
        assert code == 4
        assert says in err


def test_a_mistyped_folder_is_not_a_hub_id(talks, tmp_path, whole_base, capsys):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "tiny").symlink_to(whole_base)
    some = recipe("sft", "run", [talks], model={"base": "bases/tyny", "random_init": False})
    path = write_recipe(tmp_path / "r.yaml", some)
    for arguments in (["check", path], ["preview", path], ["train", path], ["train", path, "--smoke"]):
        code, _, err = main_here(capsys, *arguments)
        assert code == 4, arguments
        assert "model.base bases/tyny: no such folder; did you mean bases/tiny?" in err
