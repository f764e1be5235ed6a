"""Tasks of lm-eval: the same figures as lm-eval called by hand, offline, cached, and clear errors."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval")

from nesso_tune import DataError, ModelError, RecipeError, RunEnvironmentError
from nesso_tune.evaluation import harness, runner
from nesso_tune.evaluation.runner import EvaluationOptions, evaluate
from nesso_tune.evaluation.suites import Suite
from tests.support.runs import main_here

MC_TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Domanda: {{question}}\\nRisposta:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def questions(write_rows):
    """Twelve questions with three options."""
    rows = [
        {"question": f"Quanto fa {i} + {i % 3}?", "choices": [str(i), str(i + 1), f"circa {i + 2}"], "gold": i % 3}
        for i in range(12)
    ]
    return write_rows(rows, "questions.jsonl")


@pytest.fixture
def suite_file(tmp_path, questions):
    """A suite with a multiple-choice task of its own and a shipped task on local rows."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "capitals.yaml").write_text(MC_TASK % questions)
    rows = [
        {"ctx": f"Il numero {i} viene", "endings": [f"prima di {i + 1}", "mai", "dopo un gatto", "ieri"], "label": "0",
         "activity_label": "Numeri", "ctx_a": f"Il numero {i}", "ctx_b": "viene", "query": f"Numeri: il {i} viene",
         "choices": [f"prima di {i + 1}", "mai", "dopo un gatto", "ieri"], "gold": 0}
        for i in range(5)
    ]  # fmt: skip
    local = tmp_path / "hellaswag.jsonl"
    local.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "suite.yaml"
    file.write_text(
        f"title: local\ntask_folder: {tasks}\ntasks:\n"
        "  - {task: capitals, metrics: [acc, acc_norm]}\n"
        f"  - {{task: hellaswag_it, metrics: [acc_norm], few_shot: 0, data: {local}}}\n"
        "reference: {Another: {capitals/acc: 0.5}}\n"
    )
    return file


def run(capsys, *arguments):
    return main_here(capsys, "eval", *arguments)


def test_the_table_equals_lm_eval_called_by_hand(chat_model, suite_file, tmp_path, questions, capsys):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    code, out, err = run(capsys, chat_model, "--suite", suite_file, "--json")
    assert code == 0, err
    (values,) = json.loads(out).values()

    include = tmp_path / "by_hand"
    include.mkdir()
    upstream = harness.task_file("hellaswag_it", None)
    lines = {"include": str(upstream), "task": "hellaswag_it", "dataset_path": "json", "dataset_name": None,
             "dataset_kwargs": {"data_files": {"val": str(tmp_path / "hellaswag.jsonl")}}}  # fmt: skip
    (include / "hellaswag_it.yaml").write_text(json.dumps(lines))
    shutil.copy(tmp_path / "tasks" / "capitals.yaml", include)
    by_hand = simple_evaluate(
        model="hf", model_args={"pretrained": str(chat_model)}, tasks=["capitals", "hellaswag_it"], device="cpu",
        task_manager=TaskManager(include_path=[str(include)], include_defaults=False),
    )["results"]  # fmt: skip
    for task, metric in (("capitals", "acc"), ("capitals", "acc_norm"), ("hellaswag_it", "acc_norm")):
        assert values[f"{task}/{metric}"] == by_hand[task][f"{metric},none"]
        assert values[f"{task}/{metric}_stderr"] == by_hand[task][f"{metric}_stderr,none"]

    code, out, _ = run(capsys, chat_model, "--suite", suite_file)
    rows = [line.split() for line in out.splitlines() if line.startswith("capitals acc ")]
    assert rows[0][2:] == [f"{values['capitals/acc']:.4f}", "±", f"{values['capitals/acc_stderr']:.4f}", "0.5000"]


def test_a_second_call_computes_nothing_and_a_changed_model_or_task_everything(
    chat_model, suite_file, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(chat_model, copy)
    assert "evaluating" in run(capsys, copy, "--suite", suite_file)[2]
    code, out, err = run(capsys, copy, "--suite", suite_file)
    assert code == 0
    assert "evaluating" not in err
    assert "from the cache" in out

    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    assert run(capsys, copy, "--suite", suite_file)[2].count("evaluating") == 2

    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert run(capsys, copy, "--suite", suite_file)[2].count("evaluating") == 2

    rows = tmp_path / "hellaswag.jsonl"
    rows.write_text(rows.read_text().replace("ieri", "oggi"))
    assert run(capsys, copy, "--suite", suite_file)[2].count("evaluating") == 1


def test_an_interrupted_evaluation_continues_with_the_next_task(chat_model, suite_file, capsys, monkeypatch):
    run_task = harness.run_task

    def interrupted(lm, task, *rest):
        if task.task == "hellaswag_it":
            raise KeyboardInterrupt
        return run_task(lm, task, *rest)

    suite = Suite.model_validate(_raw(suite_file))
    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_task", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate([str(chat_model)], suite)
    (result,) = evaluate([str(chat_model)], suite)
    assert result.computed == ("hellaswag_it",)


def _raw(path):
    from nesso_tune.recipes.yaml_source import read_document

    return read_document(path).value


def test_scores_of_prompts_reproduce_the_metric(chat_model, suite_file):
    (result,) = evaluate([str(chat_model)], Suite.model_validate(_raw(suite_file)), EvaluationOptions(limit=7))
    metric = result.metrics["capitals/acc"]
    assert len(metric.scores) == 7
    assert metric.prompts == tuple(range(7))
    assert metric.value == sum(metric.scores) / 7


def test_several_models_are_compared_in_one_table(chat_model, suite_file, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(chat_model, other)
    code, out, _ = run(capsys, chat_model, other, "--suite", suite_file)
    assert code == 0
    assert "*" in next(line for line in out.splitlines() if line.startswith("capitals acc "))
    assert "not distinguishable" in out
    code, out, _ = run(capsys, chat_model, other, "--suite", suite_file, "--json")
    assert set(json.loads(out)) == {str(chat_model), str(other)}


def test_two_at_once_compute_each_task_once(chat_model, suite_file):
    from tests.support.processes import Forked

    both = [Forked("eval", chat_model, "--suite", suite_file, "--json") for _ in range(2)]
    assert [each.wait() for each in both] == [0, 0], both[0].stderr + both[1].stderr
    assert sum(each.stderr.count("evaluating") for each in both) == 2
    assert both[0].stdout == both[1].stdout


def test_ranks_share_the_work_and_get_the_same_figures(chat_model, suite_file, tmp_path, capsys):
    from tests.support.processes import Ranks

    alone = run(capsys, chat_model, "--suite", suite_file, "--json")[1]
    ranks = Ranks("eval", chat_model, "--suite", suite_file, "--json", module="nesso_tune",
                  NESSO_TUNE_CACHE=str(tmp_path / "other_cache"))  # fmt: skip
    assert ranks.wait() == 0, ranks.stderr
    together = json.loads(ranks.stdout)
    for suite, values in json.loads(alone).items():
        assert together[suite] == pytest.approx(values, rel=1e-9)


# Bad input


@pytest.mark.parametrize(
    ("task", "near"), [("arc", "arc_challenge"), ("ifeval-ita", "ifeval"), ("hellaswag-it", "hellaswag_it")]
)
def test_an_unknown_task_names_the_nearest(task, near):
    with pytest.raises(RecipeError, match=f"did you mean.*`{near}`"):
        harness.task_file(task, None)


def test_data_that_is_not_at_hand_names_itself_and_the_command(chat_model, capsys):
    code, out, err = run(capsys, chat_model, "--suite", "nesso")
    assert code == 3
    assert not out
    named = {"hellaswag_it": "alexandrainst/m_hellaswag", "ifeval": "google/IFEval", "mmlu": "cais/mmlu",
             "ifeval_it": "mii-llm/ifeval-ita", "arc_challenge": "allenai/ai2_arc"}  # fmt: skip
    for task, data in named.items():
        line = next(line for line in err.splitlines() if line.startswith(f"task {task}:"))
        assert data in line
        assert "nesso-tune eval --fetch-only" in line
        assert f"--data {task}=FILE" in line


def test_local_rows_must_fit_the_splits(chat_model, suite_file, questions, capsys):
    options = (chat_model, "--suite", suite_file, "--data")
    assert "has no split `tset`" in run(capsys, *options, f"hellaswag_it/tset={questions}")[2]
    assert "did you mean `hellaswag_it`" in run(capsys, *options, f"hellaswag={questions}")[2]
    code, _, err = run(capsys, *options, "hellaswag_it=nowhere.jsonl")
    assert code == 3
    assert "nowhere.jsonl" in err
    code, _, err = run(capsys, *options, f"hellaswag_it={questions}")
    assert code == 3
    assert "cannot use its rows" in err


def test_a_few_shot_task_needs_a_file_for_its_examples(tmp_path, questions, suite_file):
    tasks = {"title": "t", "tasks": [{"task": "m_mmlu_it", "metrics": ["acc"], "few_shot": 5, "data": questions}]}
    with pytest.raises(RecipeError, match=r"no file for the split `train`.*m_mmlu_it/train=FILE"):
        harness.load_task(Suite.model_validate(tasks).tasks[0], None)


def test_an_unknown_metric_lists_those_of_the_task(chat_model, suite_file):
    raw = _raw(suite_file)
    raw["tasks"] = [{"task": "capitals", "metrics": ["accuracy"]}]
    with pytest.raises(RecipeError, match="no metric `accuracy`; use acc, acc_norm"):
        evaluate([str(chat_model)], Suite.model_validate(raw))


def test_a_model_without_a_template_cannot_do_a_chat_task(whole_base, suite_file):
    raw = _raw(suite_file)
    raw["tasks"] = [{"task": "capitals", "metrics": ["acc"], "chat_template": True}]
    with pytest.raises(ModelError, match="has no chat template, which task capitals needs"):
        evaluate([whole_base], Suite.model_validate(raw))


def test_backends(chat_model, suite_file, capsys):
    assert "there is no backend `vlm`" in run(capsys, chat_model, "--suite", suite_file, "--backend", "vlm")[2]
    with pytest.raises(RunEnvironmentError, match="vllm is not installed; install it: pip install vllm"):
        harness.check_backend("vllm")


def test_fetch_only_counts_the_prompts(suite_file, capsys):
    code, out, _ = run(capsys, "--suite", suite_file, "--fetch-only")
    assert code == 0
    assert out == "capitals: 12 prompts\nhellaswag_it: 5 prompts\n"
    assert run(capsys, "--suite", suite_file)[0] == 2


def test_missing_data_raises_one_error_for_all(suite_file):
    raw = _raw(suite_file)
    raw["tasks"] = [{"task": "arc_it", "metrics": ["acc"]}, {"task": "m_mmlu_it", "metrics": ["acc"]}]
    raw["reference"] = {}
    with pytest.raises(DataError) as caught:
        runner.fetch(Suite.model_validate(raw))
    assert len(caught.value.problems) == 2


def test_a_missing_package_of_a_task_is_named(chat_model, write_rows, monkeypatch):
    def load(*arguments):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr(harness, "_load", load)
    task = {"task": "ifeval", "metrics": ["inst_level_loose_acc"], "data": write_rows([{}])}
    with pytest.raises(RunEnvironmentError, match="task ifeval: needs the package langdetect; install it: pip install"):
        evaluate([str(chat_model)], Suite.model_validate({"title": "t", "tasks": [task]}))


def test_a_generation_task_and_the_context_of_the_model(chat_model, write_rows):
    row = {"key": 1, "prompt": "Do not use commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    data = write_rows([row] * 2, "ifeval.jsonl")
    task = {"task": "ifeval", "metrics": ["inst_level_loose_acc"], "chat_template": True, "data": data}
    with pytest.raises(ModelError, match=r"cannot do task ifeval .*1280.*set max_new_tokens"):
        evaluate([str(chat_model)], Suite.model_validate({"title": "t", "tasks": [task]}))
    task["max_new_tokens"] = 8
    (result,) = evaluate([str(chat_model)], Suite.model_validate({"title": "t", "tasks": [task]}))
    assert len(result.metrics["ifeval/inst_level_loose_acc"].scores) == 2


def test_a_length_without_effect_is_an_error(chat_model, suite_file):
    raw = _raw(suite_file)
    raw["tasks"] = [{"task": "capitals", "metrics": ["acc"], "max_new_tokens": 8}]
    with pytest.raises(RecipeError, match="task capitals: `max_new_tokens` has no effect: it generates nothing"):
        evaluate([str(chat_model)], Suite.model_validate(raw | {"reference": {}}))
