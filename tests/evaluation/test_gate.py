"""The gate: wrong refusals, power, and the collapse that perfect preference metrics hide."""

import json
import shutil

import numpy as np
import pytest

from nesso_tune import DataError, RecipeError
from nesso_tune.evaluation.gate import Gate, bootstrap_means, common_prompts, decide, load_gate, refusal, verdict_lines
from nesso_tune.evaluation.results import mean_of
from tests.support.runs import main_here

GATE, SUITES = load_gate("default")
PROMPTS = 208


def metric(scores, better="higher", prompts=None):
    scores = [float(score) for score in scores]
    return mean_of(scores, range(len(scores)) if prompts is None else prompts, (), better)


def answers(rng, stop=0.95, italian=0.95, english=0.98, loops=0.03, empty=0.01, bits=1.0, n=PROMPTS):
    """Metrics of a model whose answers to each prompt have these properties with these probabilities."""

    def draw(share, better="higher"):
        return metric(rng.random(n) < share, better)

    return {
        "chat/stop_rate": draw(stop),
        "chat/language_fidelity/it": draw(italian),
        "chat/language_fidelity/en": draw(english),
        "chat/repetition_rate": draw(loops, "lower"),
        "chat/empty_rate": draw(empty, "lower"),
        "chat/bits_per_byte": metric(bits + rng.normal(0, 0.1, n), "lower"),
    }


def one(max_drop=0.02, confidence=0.95):
    metrics = {"chat/stop_rate": {"max_drop": max_drop}}
    return Gate.model_validate({"title": "t", "suites": ["chat"], "confidence": confidence, "metrics": metrics})


def is_refused(gate, model, parent):
    return any(verdict.refused for verdict in decide(gate, model, parent))


def test_the_default_gate_protects_the_metrics_of_its_suite():
    assert set(GATE.metrics) <= set(SUITES["chat"].metric_names)
    assert GATE.level == pytest.approx(0.05 / 6)


def test_a_sibling_seed_is_refused_in_at_most_the_stated_share():
    rng = np.random.default_rng(1)
    refused = sum(is_refused(GATE, answers(rng), answers(rng)) for _ in range(200))
    assert refused <= 200 * (1 - GATE.confidence)


def test_the_same_model_passes():
    model = answers(np.random.default_rng(2))
    assert not is_refused(GATE, model, model)
    assert all(verdict.reason == "within the tolerance" for verdict in decide(GATE, model, model))


def test_the_collapse_of_pure_dpo_is_refused():
    """Preference accuracy 1.0 and a stop rate of 27 %: the gate reads the answers."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        verdicts = decide(GATE, answers(rng, stop=0.27), answers(rng, stop=1.0))
        assert [verdict.metric for verdict in verdicts if verdict.refused] == ["chat/stop_rate"]
    error = refusal("dpo", "sft", verdicts)
    assert error.exit_code == 7
    assert "dpo: chat/stop_rate is 0." in str(error)
    assert "and 1.000 in sft: 95 % confident of a drop of at least 0.6" in str(error)


@pytest.mark.parametrize("damage", [{"italian": 0.3}, {"english": 0.5}, {"loops": 0.4}, {"empty": 0.3}, {"bits": 1.3}])
def test_each_damage_is_refused(damage):
    rng = np.random.default_rng(4)
    assert all(is_refused(GATE, answers(rng, **damage), answers(rng)) for _ in range(20))


# The table of docs/evaluation.md: probability of a refusal at 100 prompts.
POWER = {0.05: (0.20, 0.06), 0.10: (0.67, 0.39), 0.20: (0.99, 0.94)}


@pytest.mark.parametrize("drop", POWER)
def test_true_drops_are_refused_with_the_stated_power(drop):
    """Simulated answers: the parent is right in 90 %, 5 % of the verdicts differ by chance."""
    stated = dict(zip((0.05, 0.05 / 6), POWER[drop], strict=True))
    rng = np.random.default_rng(5)
    parent = rng.random((2000, 100)) < 0.9
    flipped = rng.random(parent.shape) < np.where(parent, (drop + 0.025) / 0.9, 0.025 / 0.1)
    drops = parent.astype(float) - (parent ^ flipped)
    means = bootstrap_means(drops, np.ones(100), 4000, seed=0)
    for level, power in stated.items():
        assert (np.quantile(means, level, axis=1) > 0.02).mean() == pytest.approx(power, abs=0.03)
    (verdict,) = decide(
        one(), {"chat/stop_rate": metric(parent[0] ^ flipped[0])}, {"chat/stop_rate": metric(parent[0])}
    )
    assert verdict.refused == bool(np.quantile(means[0], 0.05) > 0.02)


@pytest.mark.parametrize("noise", [0, 0.04])
@pytest.mark.parametrize("n", [18, 51, 102, 208])
def test_the_drop_of_the_80_percent_column_is_refused_in_80_percent(n, noise):
    """The column of a pair that differs by chance only, and 400 pairs with the drop that it names."""
    gate, rng = one(confidence=1 - GATE.level), np.random.default_rng(7)
    parent = np.arange(n) >= round(noise * n)  # as many wrong answers as chance makes right

    def verdict(model):
        (found,) = decide(gate, {"chat/stop_rate": metric(model)}, {"chat/stop_rate": metric(parent)})
        return found

    def simulated(drop):
        uniform = rng.random(n)
        worse, better = uniform < drop + noise, uniform > 1 - noise
        scores = np.where(worse, 1, np.where(better, -1, 0))
        return bootstrap_means(scores[None].astype(float), np.ones(n), gate.resamples, gate.seed)[0]

    drop = verdict(np.arange(n) < n - round(noise * n)).detectable
    refused = [np.quantile(simulated(drop), gate.level) > 0.02 for _ in range(400)]
    assert np.mean(refused) == pytest.approx(0.8, abs=0.05)


def test_the_drop_of_the_80_percent_column_of_bits_per_byte():
    metrics = {"chat/bits_per_byte": {"max_drop": 0.1}}
    gate, rng = Gate.model_validate({"title": "t", "suites": ["chat"], "metrics": metrics}), np.random.default_rng(8)

    def verdict(rise):
        pair = rng.normal(1, 0.3, 100), rng.normal(rise, 0.2, 100)
        model, parent = metric(pair[0] + pair[1], "lower"), metric(pair[0], "lower")
        (found,) = decide(gate, {"chat/bits_per_byte": model}, {"chat/bits_per_byte": parent})
        return found

    drop = np.mean([verdict(0).detectable for _ in range(50)])
    assert np.mean([verdict(drop).refused for _ in range(400)]) == pytest.approx(0.8, abs=0.05)
    same = {"chat/bits_per_byte": metric([0.5, 1.5], "lower")}
    assert np.isnan(decide(gate, same, same)[0].detectable), "no difference tells how large chance is"


def test_few_prompts_find_no_small_drop():
    """Models without any difference: 51 prompts do not find a drop of the tolerance."""
    (verdict,) = decide(one(), {"chat/stop_rate": metric([1] * 51)}, {"chat/stop_rate": metric([1] * 51)})
    assert 0.08 < verdict.detectable < 0.2
    (verdict,) = decide(one(1), {"chat/stop_rate": metric([1] * 51)}, {"chat/stop_rate": metric([1] * 51)})
    assert np.isnan(verdict.detectable), "a tolerance of 1 refuses nothing"


def test_prompts_without_a_value_of_the_model_are_counted_in_the_table():
    model, parent = metric([1] * 18), metric([1] * 51)
    (verdict,) = verdicts = decide(one(), {"chat/stop_rate": model}, {"chat/stop_rate": parent})
    assert (verdict.prompts, verdict.parent_prompts) == (18, 51)
    assert " 18 of 51 " in verdict_lines(one(), verdicts)[1]
    (verdict,) = verdicts = decide(one(), {"chat/stop_rate": parent}, {"chat/stop_rate": model})
    assert " of " not in verdict_lines(one(), verdicts)[1].partition("passed")[0]


def test_only_common_prompts_are_compared():
    a, b = metric([1, 0, 1, 1], prompts=[0, 1, 2, 5]), metric([0, 1, 1], prompts=[1, 2, 5])
    first, second = common_prompts(a, b)
    assert (first.scores, second.scores) == ((0.0, 1.0, 1.0), (0.0, 1.0, 1.0))
    assert first.prompts == second.prompts == (1, 2, 5)


def test_prompts_that_the_parent_does_not_know_are_not_compared():
    """Its answers to them are chance: the model loses nothing by other ones."""
    parent = {"chat/stop_rate": metric([1, 1, 1, 1]), "chat/known": metric([1, 1, 0], prompts=[0, 1, 2])}
    (verdict,) = decide(one(), {"chat/stop_rate": metric([1, 1, 0, 1])}, parent)
    assert (verdict.prompts, verdict.drop) == (3, 0), "prompt 3 has no reference answer, and counts"
    (verdict,) = decide(one(), {"chat/stop_rate": metric([0, 0, 1, 0])}, parent)
    assert verdict.refused
    with pytest.raises(DataError, match="the parent knows none of the prompts"):
        decide(one(), {"chat/stop_rate": metric([0])}, {"chat/stop_rate": metric([1]), "chat/known": metric([0])})


def test_a_metric_that_the_model_has_lost_is_refused():
    (lost,) = decide(one(), {}, {"chat/stop_rate": metric([1, 1])})
    assert (lost.refused, lost.reason) == (True, "the model has no value")
    (new,) = decide(one(), {"chat/stop_rate": metric([1, 1])}, {})
    assert not new.refused


def test_a_rise_of_a_metric_where_lower_is_better_is_a_drop():
    gate = Gate.model_validate({"title": "t", "suites": ["chat"], "metrics": {"chat/repetition_rate": {"max_drop": 0}}})
    few, many = metric([0] * 50, "lower"), metric([1] * 50, "lower")
    assert is_refused(gate, {"chat/repetition_rate": many}, {"chat/repetition_rate": few})
    assert not is_refused(gate, {"chat/repetition_rate": few}, {"chat/repetition_rate": many})


def test_faulty_gates(tmp_path):
    file = tmp_path / "gate.yaml"
    file.write_text("title: t\nsuites: [chat]\nmetrics:\n  chat/stop_rat: {max_drop: 0.1}\n")
    with pytest.raises(
        RecipeError, match=r"gate.yaml:4: no suite of the gate has the metric `chat/stop_rat`; did you mean"
    ):
        load_gate(str(file))
    with pytest.raises(RecipeError, match="there is no gate `defalt`; did you mean `default`"):
        load_gate("defalt")
    tokens = {"chat/answer_tokens": {"max_drop": 1}}
    gate = Gate.model_validate({"title": "t", "suites": ["chat"], "metrics": tokens})
    with pytest.raises(RecipeError, match="gate metric chat/answer_tokens: has no better direction"):
        decide(gate, {"chat/answer_tokens": metric([1, 2], None)}, {})


@pytest.fixture
def small_gate(tmp_path):
    """A gate on the chat suite that the command line runs quickly."""
    file = tmp_path / "gate.yaml"
    file.write_text("title: ends\nsuites: [chat]\nmetrics:\n  chat/empty_rate: {max_drop: 0.1}\n")
    return file


def test_the_command_passes_and_refuses(chat_model, small_gate, tmp_path, write_rows, capsys):
    prompts = write_rows([{"prompt": f"Quanto fa {i} più uno?", "language": "it"} for i in range(20)], "p.jsonl")
    options = ("--against", chat_model, "--gate", small_gate, "--data", f"chat={prompts}", "--max-new-tokens", "4")
    same = tmp_path / "same"
    shutil.copytree(chat_model, same)
    code, out, err = main_here(capsys, "eval", same, *options)
    assert code == 0, err
    assert "passed: within the tolerance" in out

    code, out, err = main_here(capsys, "eval", _silent(chat_model, tmp_path / "silent"), *options)
    assert code == 7, err
    assert "REFUSED: 95 % confident of a drop of at least 1.000, 0.1 is tolerated" in out
    assert "silent: chat/empty_rate is 1.000" in err
    code, out, _ = main_here(capsys, "eval", tmp_path / "silent", *options, "--json")
    assert code == 7
    (verdict,) = json.loads(out)["gate"][str(tmp_path / "silent")]
    assert verdict["refused"]
    assert verdict["prompts"] == 20


def _silent(model, folder):
    """A model that ends every answer at once: the embedding of the end token is as large as it takes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, weights = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    shutil.copytree(model, folder)
    with torch.no_grad():
        head = torch.nn.Linear(weights.config.hidden_size, weights.config.vocab_size, bias=False)
        head.weight.zero_()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Quanto fa 3 più uno?"}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        head.weight[tokenizer.eos_token_id] = weights.model(ids).last_hidden_state[0, -1] * 100
        weights.config.tie_word_embeddings = False
        weights.lm_head = head
    weights.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gate", "default"), "--gate: needs a model to compare with"),
        (("--gate", "default", "--against", "x", "--suite", "chat"), "--suite: has no effect with --gate"),
        (("--prompts", "p.jsonl", "--suite", "chat"), "--suite: has no effect with --prompts"),
        (("--judge", "http://localhost:1/v1"), "add --judge-model NAME"),
        (("--data", "chat"), "`chat` is not TASK=FILE"),
        (("--suite", "nessa"), "there is no suite `nessa`; did you mean `nesso`?"),
    ],
)
def test_options_without_effect_are_errors(chat_model, capsys, options, says):
    code, out, err = main_here(capsys, "eval", chat_model, *options)
    assert (code, out) == (2, "")
    assert says in err
