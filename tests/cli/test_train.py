"""`train` on the command line: chains, and what bad input does."""

import json

import pytest

from nesso_tune.cli.main import main
from nesso_tune.run import train
from tests.support.runs import metrics, recipe, write_recipe


@pytest.fixture
def tune(capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def chain(tmp_path, talks, pairs):
    """An SFT recipe, and a DPO recipe that starts from its result."""
    first = recipe("sft", tmp_path / "sft", [talks], train={"max_steps": 2})
    base = {"base": str(tmp_path / "sft" / "final"), "random_init": False}
    second = recipe("dpo", tmp_path / "dpo", [pairs], model=base, train={"max_steps": 2})
    return write_recipe(tmp_path / "a.yaml", first), write_recipe(tmp_path / "b.yaml", second)


def test_a_chain_runs_and_a_second_time_does_nothing(tmp_path, tune, chain):
    code, out, err = tune("train", *chain)
    assert (code, out) == (0, "")
    assert (tmp_path / "dpo" / "final" / "model.safetensors").is_file()
    code, _, err = tune("train", *chain)
    assert code == 0
    assert err.count("this run is finished") == 2


def test_a_mistake_in_the_second_recipe_stops_before_the_first_starts(tmp_path, tune, chain):
    with open(chain[1], "a", encoding="utf-8") as file:
        file.write("lerning_rate: 1\n")
    code, _, err = tune("train", *chain)
    assert code == 2
    assert "b.yaml:" in err
    assert "lerning_rate" in err
    assert not (tmp_path / "sft").exists()


MISTAKES = {
    "another kind of data": ("data.sources.0.path={talks}", 3, "contains conversations, but DPO needs"),
    "no such column": ("data.sources.0.language_field=lingua", 3, "no column `lingua`"),
    "no such format": ("data.sources.0.format=preferences", 2, "did you mean `preference`?"),
    "no such file": ("data.sources.0.path=absent.jsonl", 3, "absent.jsonl: no such file"),
    "no such template": ("chat.template=chatmll", 2, "did you mean `chatml`?"),
    "the same folder": ("output_dir={first}", 2, "has the same output_dir"),
    "a batch that does not divide": ("train.global_batch_size=3", 2, "is not a multiple of"),
}


@pytest.mark.parametrize(("setting", "code", "words"), MISTAKES.values(), ids=MISTAKES)
def test_what_can_be_known_of_the_second_is_known_before_the_first(tmp_path, tune, chain, talks, setting, code, words):
    setting = setting.format(talks=talks, first=tmp_path / "sft")
    got, _, err = tune("train", *chain, "--set", f"b:{setting}")
    assert got == code
    assert words in err
    assert not (tmp_path / "sft").exists()


def test_a_base_that_nobody_makes_is_an_error_at_once(tune, chain):
    code, _, err = tune("train", chain[1])
    assert code == 4
    assert "no such folder; run the recipe that creates it first" in err


def test_set_reaches_all_recipes_or_one(tmp_path, tune, chain):
    code, _, _ = tune("train", *chain, "--set", "logging.every_steps=2", "--set", "b:train.learning_rate=5e-5")
    assert code == 0
    assert {line["step"] for line in metrics(tmp_path / "sft") if "loss" in line} == {1, 2}
    resolved = {run: json.loads((tmp_path / run / "manifest.json").read_text())["recipe"] for run in ("sft", "dpo")}
    assert resolved["dpo"]["train"]["learning_rate"] == 5e-5
    assert resolved["sft"]["train"]["learning_rate"] == 1e-3
    code, _, err = tune("train", *chain, "--set", "c:train.learning_rate=5e-5")
    assert code == 2
    assert "does not name a recipe of this command" in err


LORA = {"adapter": {"type": "lora", "target_modules": ["attn"]}, "base": "BASE", "random_init": False}
BAD = [
    ("no such recipe", "train: nope", 2, "no shipped recipe of this name"),
    (
        "missing data",
        {"data": {"sources": [{"path": "nowhere/rows.jsonl"}]}},
        3,
        "data.sources.0.path nowhere/rows.jsonl: no such file",
    ),
    ("missing base", {"model": {"base": "./nowhere"}}, 4, "no such folder"),
    ("base without weights", {"model": {"random_init": False}}, 4, "set model.random_init: true"),
    ("flash without a GPU", {"model": {"attention": "flash", "dtype": "bfloat16"}}, 2, "set attention: auto"),
    ("end token of another template", {"chat": {"eos_token": "<|end_of_text|>"}}, 2, "would not learn to stop"),
    ("batch that does not divide", {"train": {"global_batch_size": 3, "micro_batch_size": 2}}, 2, "set it to 2 or 4"),
    ("nothing left to train on", {"data": {"validation_size": 1000}}, 2, "leave nothing to train on"),
    ("everything too long", {"data": {"sequence_len": 8}}, 3, "too_long: 30"),
    ("a layer that is not there", {"model": LORA}, 2, "use all-linear, or some of down_proj"),
    (
        "a split of a local file",
        {"data": {"sources": [{"path": "TALKS", "split": "test"}]}},
        2,
        "`split` has no effect",
    ),
    (
        "a language column that is not there",
        {"data": {"sources": [{"path": "TALKS", "language_field": "lingua"}]}},
        3,
        "no column `lingua`",
    ),
    ("a tracker that is not installed", {"logging": {"report_to": ["mlflow"]}}, 5, "pip install mlflow"),
]


@pytest.mark.parametrize(("sections", "code", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_says_what_to_do(tmp_path, tune, talks, sections, code, says):
    if isinstance(sections, str):
        path = tmp_path / "missing"
    else:
        some = recipe("sft", tmp_path / "run", [talks], **sections).to_yaml().replace("TALKS", talks)
        if "BASE" in some:
            first = train(recipe("sft", tmp_path / "base", [talks], train={"max_steps": 1}, evaluation=None))
            some = some.replace("BASE", str(first.model_dir))
        path = tmp_path / "bad.yaml"
        path.write_text(some, encoding="utf-8")
    ended, out, err = tune("train", path)
    assert says in err
    assert (ended, out) == (code, "")
    assert "Traceback" not in err
    assert "internal error" not in err
    assert not (tmp_path / "run" / "final").exists()


def test_interrupted_runs_say_how_to_go_on(tune, chain, monkeypatch):
    from nesso_tune.training.sft import ConversationTrainer

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConversationTrainer, "training_step", interrupt)
    code, _, err = tune("train", chain[0])
    assert code == 75
    assert "run the same command to continue" in err


def test_debug_shows_the_traceback(tune):
    code, _, err = tune("train", "nope", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_two_recipes_of_one_command_need_folders_of_their_own(tmp_path, tune, chain):
    code, _, err = tune("train", *chain, "--set", f"b:output_dir={tmp_path / 'sft'}")
    assert code == 2
    assert "has the same output_dir" in err
    assert not (tmp_path / "sft").exists()


def test_a_missing_file_of_the_second_recipe_stops_before_the_first_starts(tmp_path, tune, chain):
    code, _, err = tune("train", *chain, "--set", "b:data.sources.0.path=nowhere.jsonl")
    assert code == 3
    assert "nowhere.jsonl: no such file" in err
    assert not (tmp_path / "sft").exists()


FLAGS = {
    "a checkpoint of no recipe": (["--resume", "SFT/checkpoint-2", "b.yaml"], "--resume: "),
    "a key that is none": (["--allow-changes", "train.lerning_rate", "a.yaml"],
                           "--allow-changes: unknown key `train.lerning_rate`; did you mean `train.learning_rate`?"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "says"), FLAGS.values(), ids=FLAGS)
def test_flags_that_would_do_nothing(tmp_path, tune, chain, words, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SFT" / "checkpoint-2").mkdir(parents=True)
    code, _, err = tune("train", *words)
    assert code == 2
    assert says in err
