"""Sampled answers: seeded, and continued where a call was interrupted."""

import json

import pytest

from nesso_tune import Conversation, Message, RecipeError, Sampling, generate
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
