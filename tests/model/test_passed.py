"""Objects that are passed to `train`: what the run records of them, and what cannot be used."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from plotly.basedatatypes import BaseFigure
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import ExportableState

from nesso_tune import DataError, ModelError, RecipeError, load_recipe, train
from nesso_tune.data.sources import passed_source
from nesso_tune.model.passed import with_passed
from nesso_tune.recipes.sections import Source
from nesso_tune.reports.charts import comparison_charts
from tests.support.runs import metrics, recipe

ROWS = [{"prompt": f"Quanto fa {i} + 1?", "response": f"Fa {i + 1}.", "lang": "it"} for i in range(12)]


def raises_value_error(_):
    raise ValueError("Mime type rendering requires nbformat>=4.2.0 but it is not installed")


class Count(TrainerCallback, ExportableState):
    """Counts steps, over a resume too."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}


def letters(answer):
    """Length of the answer in characters."""
    return len(answer.text)


@pytest.fixture(scope="module")
def model(whole_base):
    return AutoModelForCausalLM.from_pretrained(whole_base)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cache for the module: its tests resume one run."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "unused.jsonl").write_text(json.dumps({"prompt": "?", "response": "!"}) + "\n")
    return folder


@pytest.fixture
def call(shared, model, monkeypatch):
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(shared / "cache"))
    some = recipe("sft", shared / "run", [shared / "unused.jsonl"], evaluation={"samples": 2, "max_new_tokens": 4})

    def with_objects(rows=ROWS, own=model, **options):
        given = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(ROWS[:3])}
        return train(some, model=own, **given, **options)

    return with_objects


def test_a_run_with_objects_records_their_content_and_resumes_with_it_alone(call, shared, model, monkeypatch):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    count = Count()
    result = call(callbacks=[count], metrics={"letters": letters})
    assert count.steps == 4
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items()), "it is not changed"
    assert result.trainer.model is not model

    history = result.history
    assert list(history.index) == [1, 2, 3, 4]
    assert {"loss", "loss/it", "eval_loss", "eval_loss/it", "letters", "letters/it"} <= set(history.columns)
    assert history["eval_loss"].notna().tolist() == [False, True, False, True]
    assert "letters" in (shared / "run" / "report.html").read_text(), "it has a chart"
    data = json.loads((shared / "run" / "data_report.json").read_text())
    assert (data["rows_read"], data["validation"]["rows"]) == (12, 3)

    resumed = load_recipe(shared / "run" / "recipe.yaml")
    assert resumed.data.sources[0].alias == "train_dataset"
    finished = train(resumed)
    assert (finished.trained, finished.trainer) == (False, None), "its recipe names the same content"
    assert repr(finished).startswith(f"TrainResult('{shared}/run/final', step 4, was finished before, loss ")
    assert "<style" not in finished._repr_html_()
    curves = result.plot().data
    assert [(curve.name, list(curve.x)) for curve in curves] == [
        ("loss", [1, 2, 3, 4]), ("loss/it", [1, 2, 3, 4]), ("eval_loss", [2, 4]), ("eval_loss/it", [2, 4]),
    ]  # fmt: skip
    shown = []
    display = SimpleNamespace(HTML=str, display=shown.append)
    with monkeypatch.context() as patch:  # a kernel without nbformat
        patch.setitem(sys.modules, "IPython.display", display)
        patch.setattr(BaseFigure, "_ipython_display_", raises_value_error)
        result.plot()._ipython_display_()
    (html,) = shown
    assert "Plotly.newPlot(" in html
    assert '<script src="http' not in html, "it opens without a network"
    with pytest.raises(RecipeError, match="plot: the run did not measure `eval_los`; did you mean `eval_loss`"):
        result.plot("eval_los")
    (chart,) = [
        one for one in comparison_charts({"run": metrics(shared / "run")}, {"run": (0, 0)}) if one.title == "letters"
    ]
    assert chart.series[0].x == (2.0, 4.0)
    with pytest.raises(RecipeError, match="the data changed"):
        call(rows=ROWS[:9])
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(resumed.model.base)
        other.get_input_embeddings().weight[5] += 1
    with pytest.raises(RecipeError, match="the base model's weights changed"):
        call(own=other)

    shutil.rmtree(shared / "run" / "final")
    shutil.rmtree(shared / "run" / "checkpoint-4")
    again = Count()
    assert call(callbacks=[again]).trained
    assert again.steps == 4, "2 of the checkpoint, and 2 more"
    assert metrics(shared / "run")[-1]["step"] == 4


def test_the_tokenizer_alone(base, whole_base, shared, monkeypatch):
    monkeypatch.setenv("NESSO_TUNE_CACHE", str(shared / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(whole_base)
    tokenizer.model_max_length = 77
    some = recipe("sft", shared / "other", [shared / "unused.jsonl"], model={"base": whole_base, "random_init": False})
    found = with_passed(some, None, tokenizer, None, None).model
    assert (found.base != whole_base, found.random_init) == (True, False)
    assert AutoTokenizer.from_pretrained(found.base).model_max_length == 77
    weights = [AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in (found.base, whole_base)]
    assert torch.equal(*weights)
    assert with_passed(some, None, tokenizer, None, None).model == found, "the same content has the same name"


def test_a_data_set_is_read_as_the_sources_that_it_replaces(own_cache):
    one = Source(path="a.jsonl", format="alpaca", language="it", weight=2.0, split="test", private=True)
    other = Source(path="b.jsonl", format="alpaca", language="en", weight=2.0)
    rows = Dataset.from_list([{"instruction": "Ciao", "output": "Ciao!"}])
    alone, agreed = passed_source(rows, "train_dataset", [one]), passed_source(rows, "train_dataset", [one, other])
    assert (alone.format, alone.language, alone.weight, alone.split) == ("alpaca", "it", 2.0, "train")
    assert (agreed.format, agreed.language, agreed.weight, agreed.private) == ("alpaca", None, 2.0, True)
    assert passed_source(rows.select([0]), "train_dataset", [one]).path == alone.path, "named by its content"


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)


def frozen(model):
    model.lm_head.weight.requires_grad = False


def unloaded(model):
    model.to("meta")


def subclassed(model):
    model.__class__ = type("Mine", (type(model),), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "model: computes other logits than its class LlamaForCausalLM"),
        (frozen, r"model: 1 of its weights are frozen \(first: "),
        (unloaded, "model: has weights that are not loaded"),
        (subclassed, "model: is a Mine, but its files are loaded as LlamaForCausalLM; register its configuration"),
    ],
)
def test_a_model_that_its_files_do_not_give_again_is_an_error(whole_base, tmp_path, change, message):
    some, model = recipe("sft", tmp_path / "run", ["r.jsonl"]), AutoModelForCausalLM.from_pretrained(whole_base)
    change(model)
    with pytest.raises(ModelError, match=message):
        with_passed(some, model, None, None, None)


@pytest.mark.parametrize(
    ("objects", "error", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, ModelError, "model: is a Linear, not a PreTrainedModel"),
        ({"tokenizer": "gpt2"}, ModelError, "tokenizer: is a str, not a tokenizer"),
        ({"train_dataset": [{}]}, DataError, "train_dataset: is a list, not a datasets.Dataset; make one"),
        ({"eval_dataset": Dataset.from_list([])}, DataError, "eval_dataset: has no rows"),
        ({"train_dataset": DatasetDict(test=Dataset.from_list(ROWS))}, DataError, "pass one of its splits: test"),
        ({"callbacks": [3]}, RecipeError, "callbacks: int is no TrainerCallback"),
        ({"callbacks": 3}, RecipeError, "callbacks: must be a list, not int"),
        ({"metrics": {"polite": 3}}, RecipeError, "metrics polite: 3 is not a function"),
        ({"metrics": [len]}, RecipeError, "metrics: must be a mapping from names to functions, not list"),
        ({"metrics": {"stop_rate": len}}, RecipeError, "metric stop_rate: is a name that nesso-tune uses itself"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_written(tmp_path, objects, error, message):
    with pytest.raises(error, match=message):
        train(recipe("sft", tmp_path / "run", ["r.jsonl"]), **objects)
    assert not (tmp_path / "run").exists()
