"""Suite chat: its prompts and metrics, prompts of a team, the page side by side, and a judge."""

import json
import math

import pytest
import torch

from nesso_tune import DataError, RunEnvironmentError
from nesso_tune.evaluation.chat import parse_row, score
from nesso_tune.evaluation.judge import Judge, judged, parse_score
from nesso_tune.evaluation.prompts import read_prompts
from nesso_tune.evaluation.results import AnsweredPrompt, TaskResult
from nesso_tune.evaluation.suites import Task
from nesso_tune.generation.answers import Answer, Prompt, is_in_language
from nesso_tune.generation.inference import AnswerLoss, load_chat_model
from tests.support.runs import main_here

TASK = Task(kind="chat", task="chat", metrics=("stop_rate",))
ITALIAN = "La risposta è scritta in italiano, come la domanda che mi hai fatto."
ENGLISH = "The answer is written in English, unlike the question that you asked."


def answer(text, language="it", stopped=True, ids=(1, 2, 3)):
    return Answer(Prompt([], [], [], language), text, "", "", stopped, ids)


def test_shipped_prompts():
    prompts = read_prompts(TASK, parse_row)
    languages = [prompt.conversation.language for prompt in prompts]
    assert len(prompts) >= 100
    assert languages.count("it") == languages.count("en")
    assert all(prompt.answer for prompt in prompts)
    told = [is_in_language(prompt.answer, prompt.conversation.language, "") for prompt in prompts]
    assert told.count(False) <= 3, "code, and lists of words"
    assert len({prompt.text for prompt in prompts}) == len({prompt.id for prompt in prompts}) == len(prompts)


def test_metrics():
    prompts = [parse_row({"prompt": "Domanda?", "language": "it"})] * 4 + [
        parse_row({"prompt": "Q?", "language": "en"})
    ]
    loop = [5, 6] * 40
    answers = [answer(ITALIAN), answer(ENGLISH), answer("no", stopped=False, ids=loop), answer("")]
    losses = [AnswerLoss(16 * math.log(2), 40, 8), AnswerLoss(30, 40, 8), None, None, None]
    metrics = score(prompts, [*answers, answer(ENGLISH, "en")], losses).metrics
    values = {name: metric.value for name, metric in metrics.items()}
    assert values["stop_rate"] == 0.8
    assert values["language_fidelity/it"] == 0.5
    assert metrics["language_fidelity/it"].prompts == (0, 1), "short answers have no detectable language"
    assert values["language_fidelity/en"] == 1
    assert values["repetition_rate"] == values["empty_rate"] == 0.2
    assert values["answer_tokens/en"] == 3
    assert metrics["bits_per_byte"].scores[0] == 2, "16 bits over 8 bytes"
    assert metrics["known"].scores == (1.0, 0.0), "27 % and 75 % of the loss of guessing"
    assert metrics["known"].prompts == (0, 1)
    assert metrics["repetition_rate"].better == metrics["bits_per_byte"].better == "lower"
    assert metrics["answer_tokens"].better is None


def test_a_broken_answer_is_in_no_language_and_a_short_one_is_not_counted():
    prompts = [parse_row({"prompt": "Domanda?", "language": language}) for language in ("it", "it", "it", "und")]
    broken = "ttt ttt ttt ttt ttt ttt ttt ttt"
    answers = [answer(ITALIAN), answer(broken), answer("Roma."), answer(broken, "und")]
    metric = score(prompts, answers, [None] * 4).metrics["language_fidelity"]
    assert (metric.scores, metric.prompts) == ((1.0, 0.0), (0, 1))


def test_the_loss_of_reference_answers_equals_that_of_the_logits(chat_model):
    model = load_chat_model(str(chat_model))
    prompts = [parse_row({"prompt": "Quanto fa 2 + 1?", "language": "it"}), parse_row({"prompt": "Chi sei?"})]
    conversations = [prompt.conversation for prompt in prompts]
    found = model.answer_losses(conversations, ["Fa 3, è facile.", "x" * 9000])
    assert found[1] is None, "longer than the context"
    tokenizer, weights = model._tokenizer, model._model
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Quanto fa 2 + 1?"}], tokenize=False, add_generation_prompt=True
    )
    prompt, own = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, "Fa 3, è facile."))
    with torch.no_grad():
        log_probs = weights(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
    expected = -sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(own))
    assert found[0].nats == pytest.approx(expected, rel=1e-5)
    assert found[0].bytes == 16
    assert found[0].guessing == pytest.approx(len(own) * math.log(weights.config.vocab_size))


def test_reference_answers_of_rows():
    turns = [{"role": "user", "content": "Capitale?"}, {"role": "assistant", "content": "Roma."}]
    found = parse_row({"messages": turns, "language": "it"})
    assert (found.text, found.answer) == ("Capitale?", "Roma.")
    assert parse_row({"prompt": "Capitale?", "answer": "Roma."}).answer == "Roma."
    assert parse_row({"prompt": "Capitale?"}).answer is None


def test_prompts_of_a_team_and_the_page_side_by_side(chat_model, write_rows, tmp_path, capsys):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the town hall, please?"}]
    rows = [{"prompt": "Qual è la capitale d'Italia <b>?"}, {"messages": turns}]
    page = tmp_path / "pages" / "answers.html"
    options = (
        "--prompts",
        write_rows(rows),
        "--against",
        chat_model.parent / "final",
        "--html",
        page,
        "--max-new-tokens",
        "4",
    )
    code, out, err = main_here(capsys, "eval", chat_model.parent, *options)
    assert code == 0, err
    assert f"{page}: 2 prompts" in out
    html = page.read_text(encoding="utf-8")
    assert html.count("<article") == 4, "two answers to each prompt"
    assert "&lt;b&gt;" in html
    assert 'data-language="it"' in html
    assert 'data-language="en"' in html


def test_faulty_prompts_are_named(write_rows):
    file = write_rows([{"prompt": "Ciao"}, {"text": "?"}, {"prompt": " "}], "p.jsonl")
    with pytest.raises(DataError) as refused:
        read_prompts(TASK.model_copy(update={"data": file}), parse_row)
    remedy = "see docs/evaluation.md for rows of kind chat"
    assert str(refused.value).splitlines() == [
        f"{file}:2: has no 'prompt'; {remedy}", f"{file}:3: the prompt is empty; {remedy}",
    ]  # fmt: skip
    file = write_rows([{"prompt": " "}] * 7, "p.jsonl")
    with pytest.raises(DataError, match=r"p.jsonl: 2 more rows are faulty"):
        read_prompts(TASK.model_copy(update={"data": file}), parse_row)


USER = {"role": "user", "content": "Ciao"}


@pytest.mark.parametrize(("row", "wrong"), [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": None}, "`prompt` is neither a text nor a number"),
    ({"prompt": "Ciao", "answer": ["Ciao"]}, "`answer` is neither a text nor a number"),
    ({"prompt": "Ciao", "language": "klingon"}, "`language` is `klingon`, which is no language code"),
    ({"messages": []}, "`messages` is not a list of turns"),
    ({"messages": "Ciao"}, "`messages` is not a list of turns"),
    ({"messages": [USER, {"role": "user", "content": None}]}, "`content` is neither a text nor a number"),
    ({"messages": [USER, {"role": "user", "content": " "}]}, "the prompt is empty"),
    ({"messages": [{"role": "assistant", "content": "Ciao"}]}, "does not end with a user turn"),
])  # fmt: skip
def test_what_is_wrong_with_a_row(row, wrong):
    with pytest.raises(ValueError, match=wrong):
        parse_row(row)


def test_numbers_are_read_as_text_and_names_of_languages_as_codes():
    found = parse_row({"prompt": 5, "answer": 6.5, "language": "it-IT"})
    assert (found.text, found.answer, found.conversation.language) == ("5", "6.5", "it")


# The judge


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 4", 4), ("Score: **5**", 5), ("4", 4), ("4/5", 4), (" 3. ", 3), ("The answer is fine.\nscore: 2", 2),
        ("Punteggio: 1", 1), ("score: 6", None), ("score: 10", None), ("score: 4.5", None), ("", None),
        ("score: 2 ... score: 4", None), ("I would say 4 or 5", None), ("voto 3", 3),
    ],
)  # fmt: skip
def test_the_score_in_a_reply(reply, score):
    assert parse_score(reply) == score


RESULT = TaskResult({}, tuple(
    AnsweredPrompt(str(i), language, "Capitale?", text, stopped=True)
    for i, (language, text) in enumerate([("it", "Roma {sì}"), ("it", "Milano"), ("en", "Roma"), ("en", "")])
))  # fmt: skip


def test_judgements_are_means_and_cached(endpoint):
    url, stub = endpoint
    metrics = judged(RESULT, Judge(url, "stub")).metrics
    assert {name: metric.value for name, metric in metrics.items()} == {
        "judge_score": 13 / 4, "judge_score/it": 3.5, "judge_score/en": 3.0,
    }  # fmt: skip
    assert stub.requests == 3, "an empty answer is not sent"
    judged(RESULT, Judge(url, "stub"))
    assert stub.requests == 3


def test_a_judge_that_does_not_answer(endpoint, port):
    url, _ = endpoint
    with pytest.raises(RunEnvironmentError, match=r"refused a request .404 Not Found"):
        judged(RESULT, Judge(url, "other"))
    with pytest.raises(RunEnvironmentError, match="cannot be reached"):
        judged(RESULT, Judge(f"http://127.0.0.1:{port}/v1", "stub"))


def test_the_judge_on_the_command_line(chat_model, endpoint, write_rows, capsys):
    prompts = write_rows([{"prompt": "Come ti chiami, e dove abiti?"}] * 2)
    options = ("--prompts", prompts, "--judge", endpoint[0], "--judge-model", "stub", "--json", "--max-new-tokens", "4")
    code, out, err = main_here(capsys, "eval", chat_model, *options)
    assert code == 0, err
    assert json.loads(out)["chat"]["chat/judge_score"] == 2
