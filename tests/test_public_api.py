"""The public names, their documentation and their types are pinned."""

import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nesso_tune

REPOSITORY = Path(nesso_tune.__file__).parent.parent

PUBLIC = [
    "Answer", "Conversation", "DPORecipe", "DataError", "EvaluationOptions", "GateRefused", "Message", "ModelError",
    "ModelResult", "NessoError", "NumericalError", "Plan", "Preempted", "PreferencePair", "PreparedData", "RecipeError",
    "RunEnvironmentError", "SFTRecipe", "SampledAnswer", "Sampling", "TrainResult", "World", "answer_metric",
    "encode_conversation", "evaluate", "generate", "load_recipe", "load_tokenizer", "lr_multiplier", "make_plan",
    "prepare_data", "preview", "train",
]  # fmt: skip


def test_all_is_pinned():
    assert nesso_tune.__all__ == PUBLIC == sorted(nesso_tune._MODULES)


def test_every_name_can_be_imported_and_is_documented():
    for name in PUBLIC:
        assert getattr(nesso_tune, name).__doc__, name


def test_exit_codes_are_the_contract():
    codes = {
        name: getattr(nesso_tune, name).exit_code for name in PUBLIC if hasattr(getattr(nesso_tune, name), "exit_code")
    }
    assert codes == {
        "NessoError": 1, "RecipeError": 2, "DataError": 3, "ModelError": 4, "RunEnvironmentError": 5,
        "NumericalError": 6, "GateRefused": 7, "Preempted": 75,
    }  # fmt: skip


def test_help_is_short_and_names_everything():
    page = pydoc.plain(pydoc.render_doc(nesso_tune))
    assert len(page.splitlines()) < 120
    assert [name for name in PUBLIC if name not in page] == []
    assert set(PUBLIC) < set(dir(nesso_tune)), "completion still offers all names"


def test_every_function_that_takes_a_recipe_takes_what_load_recipe_does():
    for function in (nesso_tune.train, nesso_tune.prepare_data, nesso_tune.preview, nesso_tune.make_plan):
        with pytest.raises(nesso_tune.RecipeError, match="nope: no such file and no shipped recipe of this name"):
            function("nope")
        with pytest.raises(nesso_tune.RecipeError, match="the key `output_dir` is missing"):
            function({"method": "sft"})
    assert nesso_tune.make_plan("quickstart/sft") == nesso_tune.make_plan(nesso_tune.load_recipe("quickstart/sft"))


def test_arguments_out_of_range_are_named():
    with pytest.raises(nesso_tune.RecipeError, match="verify: must be one of sample, all, none, not 'some'"):
        nesso_tune.train("quickstart/sft", verify="some")
    with pytest.raises(nesso_tune.RecipeError, match=r"must be a tuple of keys, not text; write \('seed',\)"):
        nesso_tune.train("quickstart/sft", allow_changes="seed")
    for count in (0, "2"):
        with pytest.raises(nesso_tune.RecipeError, match="count: must be a whole number of at least 1, not "):
            nesso_tune.preview("quickstart/sft", count)


USER_CODE = """
from collections.abc import Mapping
from pathlib import Path

from nesso_tune import (
    Answer, Conversation, DataError, DPORecipe, EvaluationOptions, GateRefused, Message, ModelError, ModelResult,
    NessoError, NumericalError, Plan, Preempted, PreferencePair, PreparedData, RecipeError, RunEnvironmentError,
    SampledAnswer, Sampling, SFTRecipe, TrainResult, World, answer_metric, encode_conversation, evaluate, generate,
    load_recipe, load_tokenizer, lr_multiplier, make_plan, prepare_data, preview, train,
)
from transformers import TrainerCallback


class Count(TrainerCallback):  # type: ignore[misc]
    steps = 0


@answer_metric(better="higher")
def polite(answer: Answer) -> bool:
    return answer.language == "it" and "grazie" in answer.text.lower()


@answer_metric
def short(answer: Answer) -> float:
    return float(len(answer.text) < 100)


reveal_type(short)
recipe: SFTRecipe | DPORecipe = load_recipe("quickstart/sft", {"train.best_metric": "polite"})
recipe = load_recipe(Path("r.yaml"))
recipe = load_recipe({"method": "sft"})
recipe = recipe.replace({"train.learning_rate": 1e-3})
if isinstance(recipe, SFTRecipe):
    reveal_type(recipe.data.packing)
    reveal_type(recipe.replace({}))
data: PreparedData = prepare_data(recipe)
data = prepare_data("quickstart/sft")
print(make_plan({"method": "sft"}).steps, preview(Path("r.yaml"), 1).to_text(), load_recipe(recipe, {"seed": 1}))
plan: Plan = make_plan(recipe, World(8), data.volume)
print(plan.steps, preview(recipe, 2).to_text(), lr_multiplier(3, total_steps=9, warmup_steps=1, constant_ratio=1.0,
                                                              min_ratio=0.0))
tokenizer = load_tokenizer("base")
talk = Conversation((Message("user", "Ciao"), Message("assistant", "Ciao!")))
ids, labels = encode_conversation(talk, tokenizer)
pair = PreferencePair(talk.messages[:1], talk.messages[1], Message("assistant", "Boh."))
try:
    result: TrainResult = train("quickstart/sft", callbacks=[Count()], tokenizer=tokenizer,
                                metrics={"polite": polite, "brief": lambda answer: len(answer.text) < 100})
    reveal_type(result.model_dir)
    reveal_type(result.metrics)
    print(result.history["loss"], result.plot("loss"), result.trainer, result.report)
    answers: list[list[SampledAnswer]] = generate(result.model_dir, ["Ciao", talk], n=2,
                                                  sampling=Sampling(temperature=0.8), seed=1)
    print(answers[0][0].text)
    results: list[ModelResult] = evaluate(result.model_dir, "chat", EvaluationOptions(limit=5))
    reveal_type(results[0].metrics["chat/polite"].value)
except (Preempted, GateRefused, NumericalError, RunEnvironmentError, ModelError, DataError, RecipeError) as error:
    print(error.problems)
except NessoError as error:
    print(error.exit_code)
train(3)
recipe.replace("seed")
evaluate(result.model_dir, limit=3)
"""
# Only the modules of public names are followed, which keeps the check cheap.
MODULES = [*nesso_tune._MODULES.values(), "nesso_tune.recipes.sections", "nesso_tune.recipes.builtin"]
MYPY = f"""
[mypy]
strict = true
plugins = pydantic.mypy
[mypy-nesso_tune.*]
follow_imports = skip
[mypy-{",".join(sorted({"nesso_tune", *MODULES}))}]
follow_imports = normal
[mypy-torch.*,numpy.*,transformers.*,trl.*,peft.*,accelerate.*,datasets.*,rich.*,pyarrow.*,pandas.*,plotly.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_a_user_sees_the_types(tmp_path):
    """The package stands on PYTHONPATH, where mypy reads types only of packages with py.typed."""
    (tmp_path / "user.py").write_text(USER_CODE)
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600).stdout
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in out.splitlines() if "Revealed" in line]
    assert revealed == [
        "def (answer: nesso_tune.generation.answers.Answer) -> float",
        "bool", "nesso_tune.recipes.schema.SFTRecipe", "pathlib.Path", "dict[str, Any]", "float",
    ], out  # fmt: skip
    errors = [line.partition(": error: ")[2] for line in out.splitlines() if ": error: " in line]
    assert [re.split(r";|  \[", error)[0] for error in errors] == [
        'Argument 1 to "train" has incompatible type "int"',
        'Argument 1 to "replace" of "BaseRecipe" has incompatible type "str"',
        'Unexpected keyword argument "limit" for "evaluate"',
    ], out  # fmt: skip
