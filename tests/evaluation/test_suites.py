"""Suite files: the shipped ones, and errors that say what to do."""

import re

import pytest

from nesso_tune import RecipeError
from nesso_tune.evaluation.results import Metric, ModelResult, TaskResult, mean_of
from nesso_tune.evaluation.suites import load_suite, with_data, with_max_new_tokens
from nesso_tune.evaluation.table import stderr_of_difference, to_json, to_lines
from nesso_tune.recipes.builtin import template_names


@pytest.mark.parametrize("name", template_names("suites"))
def test_shipped_suites_are_valid(name):
    assert load_suite(name).metric_names


def test_the_suite_nesso_has_the_eight_figures_of_the_card():
    suite = load_suite("nesso")
    assert [task.task for task in suite.tasks] == [
        "ifeval", "ifeval_it", "arc_challenge", "arc_it", "hellaswag", "hellaswag_it", "mmlu", "m_mmlu_it",
    ]  # fmt: skip
    assert [task.few_shot for task in suite.tasks] == [0, None, 0, 0, 0, 0, 5, 5]
    (card,) = suite.reference.values()
    assert list(card.values()) == [0.3465, 0.2962, 0.3003, 0.2874, 0.4629, 0.4076, 0.2871, 0.2875]
    assert tuple(card) == suite.metric_names


FAULTY = {
    "unknown key": ("tasks: [{task: arc_it, metrics: [acc], fewshot: 3}]", "fewshot"),
    "no metrics": ("tasks: [{task: arc_it, metrics: []}]", "metrics"),
    "twice": ("tasks:\n- {task: arc_it, metrics: [acc]}\n- {task: arc_it, metrics: [acc_norm]}",
              ":4: a second task `arc_it`; list each task once"),
    "inert": ("tasks: [{kind: chat, task: chat, metrics: [stop_rate], few_shot: 1}]",
              "`few_shot` has no effect on kind chat; remove it"),
    "length": ("tasks: [{kind: invalsi, task: i, metrics: [acc], max_new_tokens: 5}]",
               "`max_new_tokens` has no effect on log-likelihoods"),
    "splits": ("tasks: [{kind: chat, task: chat, metrics: [stop_rate], data: {test: f.jsonl}}]",
               "kind chat has no splits; name one file"),
    "method": ("tasks: [{kind: invalsi, task: i, metrics: [acc], method: generation, chat_template: true}]",
               "`chat_template` has no effect on `method: generation`"),
    "reference": ("tasks: [{task: arc_it, metrics: [acc]}]\nreference: {Nesso: {arc_it/ac: 0.5}}",
                  "`arc_it/ac` is no metric of this suite; did you mean `arc_it/acc`?"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY)
def test_faulty_suites(tmp_path, fault):
    text, says = FAULTY[fault]
    file = tmp_path / "suite.yaml"
    file.write_text(f"title: t\n{text}\n")
    with pytest.raises(RecipeError, match=re.escape(says)):
        load_suite(str(file))


def test_data_of_single_splits():
    suite = with_data(load_suite("nesso"), {"m_mmlu_it/test": "a.jsonl", "m_mmlu_it/train": "b.jsonl"})
    assert suite.tasks[-1].data == {"test": "a.jsonl", "train": "b.jsonl"}
    with pytest.raises(RecipeError, match="task chat has no splits; write chat=FILE"):
        with_data(load_suite("chat"), {"chat/test": "a.jsonl"})


def test_a_length_of_answers_that_has_no_effect_is_an_error():
    assert with_max_new_tokens(load_suite("chat"), 7).tasks[0].max_new_tokens == 7
    generated = with_max_new_tokens(load_suite("invalsi"), 7).tasks
    assert [task.max_new_tokens for task in generated] == [None, 7]


# Results and their table


def result(model, scores, better="higher"):
    return ModelResult(model, {"chat": TaskResult({"stop_rate": mean_of(scores, range(len(scores)), (), better)})})


def test_standard_errors_are_those_of_lm_eval():
    metric = mean_of([1, 0, 0, 1, 1], range(5))
    assert metric.value == 0.6
    assert metric.stderr == pytest.approx((0.3 / 5) ** 0.5)  # sample variance 0.3
    weighted = mean_of([1, 0, 0.5], range(3), [1, 1, 2])
    assert weighted.value == 0.5
    assert mean_of([0.5], [0]).stderr is None


def test_results_survive_json():
    before = TaskResult({"a": mean_of([0.1, 1 / 3], [0, 1], [1, 2], "lower"), "b": Metric(0.5)})
    assert TaskResult.from_json(before.to_json()) == before


def test_the_difference_of_two_models_is_paired():
    a, b = mean_of([1, 1, 0, 0], range(4)), mean_of([1, 1, 0, 1], range(4))
    assert stderr_of_difference(a, a) == 0
    assert stderr_of_difference(a, b) == pytest.approx(0.25)
    others = mean_of([1, 1, 0, 1], range(4, 8))
    assert stderr_of_difference(a, others) == pytest.approx(((a.stderr**2) + (others.stderr**2)) ** 0.5)


def test_the_best_model_is_marked():
    suite = load_suite("chat")
    good, close, bad = [1] * 98 + [0, 0], [1] * 97 + [0] * 3, [1] * 50 + [0] * 50
    lines = to_lines(suite, [result("good", good), result("close", close), result("bad", bad)])
    (row,) = [line.split() for line in lines if line.startswith("chat stop_rate")]
    assert [cell[-1] for cell in row[4::3]] == ["*", "~", row[10][-1]]
    assert row[10][-1] not in "*~"
    lower = to_lines(suite, [result("a", good, "lower"), result("b", bad, "lower")])
    assert next(line for line in lower if line.startswith("chat stop_rate")).rstrip().endswith("*")


def test_json_of_one_and_of_several_models():
    suite, one, other = load_suite("chat"), result("one", [1, 0]), result("other", [1, 1])
    assert to_json("chat", suite, [one]) == {"chat": {"chat/stop_rate": 0.5, "chat/stop_rate_stderr": 0.5}}
    assert set(to_json("chat", suite, [one, other])) == {"one", "other"}
