"""Sampled answers: seeded, and continued where a call was interrupted."""

import json

import numpy as np
import pytest
from transformers import GenerationConfig

from nesso_tune import Conversation, DataError, Message, RecipeError, Sampling, generate
from nesso_tune.generation.inference import load_chat_model
from tests.support.runs import main_here


@pytest.fixture
def call(chat_model, write_rows, tmp_path, capsys):
    prompts = write_rows([{"prompt": f"Quanto fa {i} più uno?", "language": "it"} for i in range(11)], "prompts.jsonl")

    def generate(*options, output="out.jsonl"):
        return main_here(capsys, "generate", chat_model, "--prompts", prompts, "--n", "3", "--max-new-tokens", "6",
                         "-o", tmp_path / output, *options)  # fmt: skip

    return generate


def test_an_interrupted_call_is_continued_to_the_same_file(call, tmp_path):
    code, out, err = call()
    assert code == 0, err
    assert "11 prompts with 3 answers each, 11 of them new" in out
    whole = (tmp_path / "out.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [len(row["answers"]) for row in rows] == [3] * 11
    assert len({answer["text"] for answer in rows[0]["answers"]}) > 1
    assert rows[0]["prompt"] == [{"role": "user", "content": "Quanto fa 0 più uno?"}]

    half = whole[: whole.index(b"\n", len(whole) * 9 // 11) + 5]  # a complete batch, a line and a half of the next one
    (tmp_path / "out.jsonl").write_bytes(half)
    code, out, err = call()
    assert code == 0
    assert "continues after 8 of 11 prompts" in err
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert "0 of them new" in call()[1]


def test_another_seed_gives_other_answers_and_does_not_continue_the_file(call, tmp_path):
    call()
    code, _, err = call("--seed", "7")
    assert code == 5
    assert "out.jsonl:1: was written with another model, other prompts or other settings" in err
    assert call("--seed", "7", output="other.jsonl")[0] == 0
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()


def test_equal_answers_are_refused(call):
    code, _, err = call("--temperature", "0")
    assert code == 2
    assert "--n: greedy decoding gives 3 equal answers" in err


def test_the_function_gives_the_answers_of_the_command(call, chat_model, tmp_path):
    assert call()[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [f"Quanto fa {i} più uno?" for i in range(11)]
    asked = [*prompts[:-1], Conversation((Message("user", prompts[-1]),), language="it")]
    found = generate(chat_model.parent, asked, n=3, sampling=Sampling(6, 0.8, 0.95))
    assert [[answer.text for answer in answers] for answers in found] == [
        [answer["text"] for answer in row["answers"]] for row in rows
    ]
    with pytest.raises(RecipeError, match="n: greedy decoding gives 2 equal answers; set temperature above 0"):
        generate(chat_model, ["Ciao"], n=2)


def test_a_single_prompt_is_a_list_of_one(chat_model):
    short, asked = Sampling(max_new_tokens=4), Conversation((Message("user", "Come ti chiami?"),), language="it")
    of_text = generate(chat_model, "Come ti chiami?", sampling=short)
    assert len(of_text) == 1
    assert of_text == generate(chat_model, ["Come ti chiami?"], sampling=short, n=np.int64(1))
    assert generate(chat_model, asked, sampling=short) == generate(chat_model, [asked], sampling=short)


QUESTION = {"role": "user", "content": "Ciao"}
MISTAKES = {
    "no list": (3, {}, "prompts: must be a list, not int; write a list of texts, or of Conversation"),
    "a message": (QUESTION, {}, "prompts: must be a list, not dict"),
    "messages": ([[QUESTION]], {}, r"prompts\[0\]: must be text or a Conversation, not list"),
    "no message": ([Conversation((QUESTION,))], {}, r"prompts\[0\]: has a turn that is no Message with a text"),
    "no text": (["a", Conversation((Message("user", None),))], {}, r"prompts\[1\]: has a turn that is no Message with"),
    "no turn": ([Conversation(())], {}, r"prompts\[0\]: does not end with a user turn"),
    "an answer": ([Conversation((Message("assistant", "Ciao"),))], {}, r"prompts\[0\]: does not end with a user turn"),
    "none": ("Ciao", {"n": 0}, "n: must be a whole number of at least 1, not 0"),
    "a share": ("Ciao", {"n": 1.5}, "n: must be a whole number of at least 1, not 1.5"),
    "seed": ("Ciao", {"seed": -1}, "seed: must be a whole number of at least 0, not -1"),
    "keys": ("Ciao", {"sampling": {"temperature": 1}}, "sampling: must be of class Sampling, not dict; write"),
    "nearly greedy": ("Ciao", {"n": 2, "sampling": Sampling(temperature=1e-40)}, "greedy decoding gives 2 equal"),
}


@pytest.mark.parametrize(("prompts", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_argument(prompts, options, message):
    with pytest.raises(RecipeError, match=message):
        generate("none/final", prompts, **options)


@pytest.mark.parametrize("text", ["Ciao \udcff", "\ud83d"])
def test_half_a_character_is_no_prompt(chat_model, text):
    with pytest.raises(DataError, match="is not valid Unicode \\(a lone surrogate, character"):
        generate(chat_model, [text])


def test_a_tiny_temperature_is_greedy_decoding(chat_model):
    answers = [generate(chat_model, "Ciao", sampling=Sampling(6, temperature)) for temperature in (0, 1e-40, 1e-6)]
    assert answers[0] == answers[1] == answers[2]
    assert len(generate(chat_model, "Ciao", n=2, sampling=Sampling(6, 1e-5))[0]) == 2, "the smallest that samples"


def test_greedy_decoding_replaces_the_sampling_of_a_model(chat_model):
    """Many bases have `do_sample` in their generation_config."""
    chat, question = load_chat_model(str(chat_model)), Conversation((Message("user", "Ciao"),))
    expected = chat.generate(question.messages, Sampling(12))
    own = chat._model.generation_config.to_dict()
    chat._model.generation_config = GenerationConfig(**own | {"do_sample": True, "temperature": 9.0, "top_k": 50})
    assert [chat.generate(question.messages, Sampling(12)) for _ in range(3)] == [expected] * 3
    assert [chat.sample([question], 1, Sampling(12), seed)[0][0][0] for seed in range(3)] == [expected] * 3


def test_sampling_draws_from_the_whole_vocabulary_whatever_the_model_asks_for(chat_model):
    """`top_k` of a generation_config, which is 50 by default in transformers, does not cut the distribution."""
    chat, question = load_chat_model(str(chat_model)), Conversation((Message("user", "Ciao"),))
    own = chat._model.generation_config.to_dict()
    chat._model.generation_config = GenerationConfig(**own | {"do_sample": True, "top_k": 1, "top_p": 0.01})
    hot = Sampling(8, temperature=2.0)
    assert len({chat.generate(question.messages, hot) for _ in range(4)}) > 1
    assert len({chat.sample([question], 1, hot, seed)[0][0][0] for seed in range(4)}) > 1
