"""A generated answer becomes the message that renders to it: reasoning, content and calls."""

import pytest

from nesso_tune import Message, ModelError, PreferencePair, RecipeError, load_tokenizer
from nesso_tune.chat.render import answer_segments, parse_answer
from nesso_tune.chat.template import load_template
from nesso_tune.chat.tokenizer import encoder_of
from nesso_tune.generation.inference import ChatModel, Sampling, _decode, find_model_folder
from tests.support.conversations import conversations

CALLS = ({"name": "meteo", "arguments": {"dove": "Roma"}}, {"name": "ora", "arguments": {}})
ANSWER = Message("assistant", "Guardo.", CALLS, reasoning="Serve il meteo.")
QUESTION = Message("user", "Piove?")


def generated(message, template):
    """The text of an answer as the model generates it, without the end token."""
    text = "".join(segment.text for segment in answer_segments([QUESTION], message, template))
    return text.removesuffix(template.end)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "qwen3_instruct", "mistral", "smollm3", "gemma3"])
def test_an_answer_is_read_as_it_was_written(name):
    template = load_template(name)
    thinks, calls = template.reasoning is not None, template.tools is not None
    for conversation in conversations(3, 100, tools=calls, reasoning=thinks, edges=False):
        for message in (m for m in conversation.messages if m.role == "assistant"):
            read = parse_answer(generated(message, template), template)
            assert generated(read, template) == generated(message, template)
            assert read.reasoning == message.reasoning
            if name == "mistral":
                assert (read.content, read.tool_calls) == (message.content, message.tool_calls)


def test_calls_that_are_not_json_stay_text():
    template = load_template("mistral")
    text = "Ecco.[TOOL_CALLS]meteo[ARGS]{no"
    assert parse_answer(text, template) == Message("assistant", text)


def test_reasoning_that_does_not_end_stays_text():
    text = "<think>\nPenso"
    assert parse_answer(text, load_template("qwen3")) == Message("assistant", text)


@pytest.mark.parametrize(("name", "expected"), [
    ("mistral",
     '[THINK]Serve il meteo.[/THINK]Guardo.[TOOL_CALLS]meteo[ARGS]{"dove": "Roma"}[TOOL_CALLS]ora[ARGS]{}'),
    ("qwen3", None),
])  # fmt: skip
def test_control_tokens_of_calls_are_in_the_text(base, name, expected):
    tokenizer = load_tokenizer(base, template=name)
    model = ChatModel(None, tokenizer)
    ids = encoder_of(tokenizer).pairs([PreferencePair((QUESTION,), ANSWER, QUESTION)])[0].chosen
    text = _decode(tokenizer, ids, model._shown_tokens())
    assert text == (expected or generated(ANSWER, load_template(name)))
    message = model.read(text)
    assert message.reasoning == ANSWER.reasoning
    assert encoder_of(tokenizer).pairs([PreferencePair((QUESTION,), message, QUESTION)])[0].chosen == ids


def test_a_turn_of_a_conversation_keeps_its_reasoning_out_of_the_next_prompt(base):
    tokenizer = load_tokenizer(base, template="qwen3")
    model = ChatModel(None, tokenizer)
    answer = model.read("<think>\nPenso.\n</think>\n\nSì.")
    prompt = tokenizer.decode(model._prompt_ids([QUESTION, answer, QUESTION], "it", ()))
    assert "Penso." not in prompt
    assert "assistant\nSì.<|im_end|>" in prompt


@pytest.mark.parametrize("values", [
    {"max_new_tokens": -1}, {"max_new_tokens": 2.5}, {"temperature": -3}, {"temperature": float("inf")},
    {"temperature": float("nan")}, {"temperature": "0.7"}, {"top_p": 5}, {"top_p": 0}, {"top_p": float("nan")},
])  # fmt: skip
def test_sampling_out_of_range_names_the_parameter(values):
    (name,) = values
    with pytest.raises(RecipeError, match=f"^{name}: must be a .*, not "):
        Sampling(**values)


def test_names_that_are_no_model():
    with pytest.raises(RecipeError, match='"": is an empty name; write a path or a name'):
        find_model_folder("")
    with pytest.raises(ModelError, match="no such model folder"):
        find_model_folder("a/" * 3000)
