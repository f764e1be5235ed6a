"""Reasoning of answers: an error, removed, or trained on as the template writes it; and which turns are supervised."""

import json

import pytest

from nesso_tune import Conversation, DataError, Message, PreferencePair, RecipeError, prepare_data
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.data.convert import Unusable, to_example
from nesso_tune.data.formats import load_format
from nesso_tune.recipes.rules import lint
from nesso_tune.recipes.sections import ChatSection, ModelSection
from tests.data.test_shapes import only

QUESTION = {"role": "user", "content": "Quanto fa 1+1?"}
KEYS = ("reasoning_content", "reasoning", "thinking")


def answer(text="Fa 2.", **keys):
    return {"role": "assistant", "content": text, **keys}


def row(*turns):
    return {"messages": [QUESTION, *turns]}


def read(turn):
    """The message that a turn is read as."""
    return to_example(row(turn), load_format("messages"), "sft", "it", "s").messages[1]


@pytest.mark.parametrize("key", KEYS)
def test_reasoning_is_read_from_its_keys(key):
    assert read(answer(**{key: "Penso."})) == Message("assistant", "Fa 2.", reasoning="Penso.")
    assert read(answer(**{key: None})).reasoning is None
    assert read(answer(**{key: " \n"})).reasoning is None


def test_reasoning_is_read_from_parts_of_the_content():
    parts = [
        {"type": "thinking", "thinking": "Pen"},
        {"type": "reasoning", "value": "so."},
        {"type": "text", "text": "2"},
    ]
    assert read(answer(parts)) == Message("assistant", "2", reasoning="Penso.")
    assert read(answer(parts, reasoning="Penso.")).reasoning == "Penso."  # said twice


def test_tags_in_a_text_are_text():
    text = "<think>\nPenso.\n</think>\n\nFa 2."
    assert read(answer(text)) == Message("assistant", text)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (answer(reasoning=["Penso."]), "reasoning_not_text"),
        (answer(reasoning="Penso.", thinking="Altro."), "reasoning_given_twice"),
        (answer("", reasoning="Penso."), "empty_answer"),
        ({"role": "user", "content": "x", "thinking": "Penso."}, "reasoning_not_by_assistant"),
    ],
)
def test_reasoning_that_cannot_be_used(turn, reason):
    with pytest.raises(Unusable, match=reason):
        to_example(row(turn, answer()), load_format("messages"), "sft", "it", "s")


def test_the_default_stops_at_the_first_row_and_names_the_choice(sft, write_rows):
    path = write_rows([row(answer()), row(answer(thinking="Penso."))])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: an answer has reasoning.*data\.reasoning: keep .* or drop"):
        prepare_data(sft(path))


def test_dropped_reasoning_leaves_the_rest(sft, write_rows):
    with_it, without = [row(answer(reasoning="Penso."))], [row(answer())]
    dropped = prepare_data(sft(write_rows(with_it), reasoning="drop"))
    assert only(dropped) == only(prepare_data(sft(write_rows(without, "other.jsonl"))))
    assert dropped.summary.dropped == {}


def test_kept_reasoning_is_supervised(sft, write_rows):
    for name, expected in (
        ("qwen3", "<think>\nPenso.\n</think>\n\nFa 2.<|im_end|>"),
        ("smollm3", "<think>\nPenso.\n</think>\nFa 2.<|im_end|>"),
        ("mistral", "[THINK]Penso.[/THINK]Fa 2.</s>"),
    ):
        path = write_rows([row(answer(reasoning="Penso."))])
        data = prepare_data(sft(path, chat={"template": name}, reasoning="keep", sequence_len=1024))
        assert only(data)[1] == expected
        prompt = data.chat.encoder.prompt((Message("user", "Quanto fa 1+1?"),), "it")
        assert list(data.train[0]["input_ids"][: len(prompt)]) == prompt


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma3", "qwen3_instruct", "smollm3_nothink"])
def test_a_template_without_reasoning_cannot_keep_it(sft, write_rows, name):
    with pytest.raises(
        RecipeError, match=r"data\.reasoning: keep has no effect.*has no format for reasoning; set .*drop"
    ):
        prepare_data(sft(write_rows([row(answer())]), chat={"template": name}, reasoning="keep"))


def test_prompts_with_an_empty_reasoning_contradict_keep(sft, write_rows):
    with pytest.raises(RecipeError, match="end with an empty reasoning; set it to drop"):
        prepare_data(sft(write_rows([row(answer())]), chat={"template": "qwen3_nothink"}, reasoning="keep"))


def test_pairs_that_differ_in_reasoning_alone(dpo, write_rows):
    pair = {"prompt": [QUESTION], "chosen": [answer(reasoning="Bene.")], "rejected": [answer(reasoning="Male.")]}
    path = write_rows([pair] * 2)
    with pytest.raises(DataError, match=r":1: an answer has reasoning"):
        prepare_data(dpo(path))
    with pytest.raises(DataError, match="chosen_equals_rejected: 2"):
        prepare_data(dpo(path, reasoning="drop"))
    kept = prepare_data(dpo(path, reasoning="keep").model_copy(update={"chat": ChatSection(template="qwen3")}))
    decode = kept.chat.backend.decode
    assert [decode(kept.train[0][f"{name}_ids"]) for name in ("chosen", "rejected")] == [
        f"<think>\n{thought}\n</think>\n\nFa 2." for thought in ("Bene.", "Male.")
    ]


def test_duplicates_are_told_apart_by_reasoning(sft, write_rows):
    path = write_rows([row(answer(reasoning=text)) for text in ("a", "b", "b")])
    data = prepare_data(sft(path, chat={"template": "qwen3"}, reasoning="keep"))
    assert data.summary.duplicates == 1


def test_cleaning_reaches_reasoning(sft, write_rows):
    path = write_rows([row(answer(reasoning="Pen\u200bso."))])
    data = prepare_data(sft(path, chat={"template": "qwen3"}, reasoning="keep", clean={"invisible": "remove"}))
    assert "Penso." in only(data)[1]


def test_a_user_reader_can_return_reasoning(sft, write_rows, tmp_path):
    (tmp_path / "own.py").write_text(
        "from nesso_tune import Conversation, Message\n"
        "def read(row):\n"
        "    turn = Message('assistant', row['a'], reasoning=row['r'])\n"
        "    return Conversation((Message('user', row['q']), turn))\n"
    )
    path = write_rows([{"q": "q", "a": "a", "r": "Penso."}])
    source = {"path": path, "format": f"{tmp_path}/own.py:read"}
    assert "Penso." in only(prepare_data(sft(source, chat={"template": "qwen3"}, reasoning="keep")))[1]


TWO = [
    QUESTION,
    answer("Fa 2.", reasoning="Uno."),
    {"role": "user", "content": "E 2+2?"},
    answer("4.", reasoning="Due."),
]


def test_only_the_last_turn_is_supervised(sft, write_rows):
    path = write_rows([{"messages": [*TWO, {"role": "user", "content": "Grazie."}]}])
    text, learned = only(prepare_data(sft(path, reasoning="drop", turns_to_train="last")))
    assert learned == "4.<|im_end|>"
    assert text.endswith("assistant\n4.<|im_end|>\n"), "what comes after it is left out"
    all_turns = only(prepare_data(sft(path, reasoning="drop")))[1]
    assert all_turns == "Fa 2.<|im_end|>4.<|im_end|>"


def test_flags_of_messages_count_before_the_last_is_taken(sft, write_rows):
    turns = [TWO[0], answer("Fa 2."), TWO[2], answer("4.", train=False)]
    assert only(prepare_data(sft(write_rows([{"messages": turns}]), turns_to_train="last")))[1] == "Fa 2.<|im_end|>"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_nothink"])
def test_answers_that_no_prompt_leads_to_are_an_error(sft, write_rows, name):
    turns = [{**turn, "reasoning": None} for turn in TWO]
    path = write_rows([row(answer()), {"messages": turns}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the chat template writes answers before the last user turn"):
        prepare_data(sft(path, chat={"template": name}))
    data = prepare_data(sft(path, chat={"template": name}, turns_to_train="last", packing=False))
    assert len(data.train) == 2


def test_a_call_before_the_last_answer_has_no_empty_reasoning(sft, write_rows):
    call = {"name": "somma", "arguments": {"a": 1}}
    turns = [QUESTION, answer("", tool_calls=[call]), {"role": "tool", "content": "2"}, answer()]
    path = write_rows([{"messages": turns, "tools": [{"name": "somma", "parameters": {}}]}])
    with pytest.raises(DataError, match="answers before the last turn"):
        prepare_data(sft(path, chat={"template": "qwen3_nothink"}, sequence_len=1024))
    learned = only(prepare_data(sft(path, chat={"template": "qwen3"}, sequence_len=1024)))[1]
    assert learned.startswith("<tool_call>"), "with reasoning, the model may begin with the call"


def test_kept_history_is_dropped_as_at_inference(sft, write_rows):
    path = write_rows([{"messages": TWO}])
    data = prepare_data(sft(path, chat={"template": "qwen3"}, reasoning="keep", turns_to_train="last"))
    text, learned = only(data)
    assert "Uno." not in text
    assert learned == "<think>\nDue.\n</think>\n\n4.<|im_end|>"
    turns = tuple(Message(t["role"], t["content"], reasoning=t.get("reasoning")) for t in TWO)
    prompt = data.chat.encoder.prompt(turns[:3], "it")
    assert list(data.train[0]["input_ids"][: len(prompt)]) == prompt
    pair = PreferencePair(turns[:3], turns[3], Message("assistant", "5."))
    encoded = data.chat.encoder.pairs([pair])[0]
    assert (encoded.prompt, encoded.prompt + encoded.chosen) == (prompt, list(data.train[0]["input_ids"])[:-1])


@pytest.mark.parametrize(("key", "value"), [("turns_to_train", "last"), ("reasoning", "drop")])
def test_keys_without_effect(key, value):
    data = {"sources": [{"path": "a", "format": "completion"}], key: value}
    (finding,) = lint({"method": "sft", "data": data})
    assert (finding.path, finding.what) == (("data", key), "has no effect under format: completion")
    data["sources"].append({"path": "b"})
    assert lint({"method": "sft", "data": data}) == []


def test_an_unknown_template_is_named(base):
    with pytest.raises(RecipeError, match="did you mean `qwen3`"):
        chat_tokenizer(ModelSection(base=base, random_init=True), ChatSection(template="qwen_3"))


def test_tools_on_a_template_without_tools(sft, write_rows):
    path = write_rows([{**row(answer()), "tools": [{"name": "somma", "parameters": {}}]}])
    with pytest.raises(RecipeError, match="has no tool format, but the data contains tools"):
        prepare_data(sft(path, chat={"template": "gemma3"}))


def test_a_system_message_without_a_user_turn_cannot_be_folded(base):
    chat = chat_tokenizer(ModelSection(base=base, random_init=True), ChatSection(template="gemma3"))
    turns = (Message("system", "S"), Message("assistant", "a"))
    with pytest.raises(RecipeError, match="into the first user turn, but another turn comes first"):
        chat.encoder.conversations([Conversation(turns)])


def test_report_of_json(sft, write_rows):
    data = prepare_data(sft(write_rows([row(answer(reasoning=["x"])), row(answer())])))
    assert json.loads(json.dumps(data.report))["dropped"] == {"reasoning_not_text": 1}
