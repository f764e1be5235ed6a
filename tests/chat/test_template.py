"""The Jinja that a model is served with says the same as the segments that it was trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from nesso_tune import Conversation, Message, RecipeError, encode_conversation, load_tokenizer
from nesso_tune.chat.encoding import IGNORE_INDEX
from nesso_tune.chat.jinja import to_jinja
from nesso_tune.chat.template import load_template
from nesso_tune.chat.tokenizer import chat_tokenizer
from nesso_tune.recipes.sections import ChatSection, ModelSection
from tests.support.examples import examples

# Text that begins with a blank may merge with the header in Jinja, and control text would become a control token.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: not text[:1].isspace() and "<|" not in text
)
MESSAGES = st.lists(
    st.builds(dict, role=st.sampled_from(["system", "user", "assistant", "tool"]), content=TEXT), min_size=1, max_size=5
)


def segments_of(messages, tokenizer, language="und", **kwargs):
    turns = tuple(Message(m["role"], m["content"]) for m in messages)
    return encode_conversation(Conversation(turns, language=language), tokenizer, **kwargs)


def jinja_of(messages, tokenizer, **kwargs):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)


@examples(80)
@given(MESSAGES)
def test_jinja_gives_the_ids_and_the_mask_of_the_segments(tokenizer, messages):
    ids, labels = segments_of(messages, tokenizer)
    rendered = jinja_of(messages, tokenizer, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels]


@examples(40)
@given(MESSAGES)
def test_a_generation_starts_from_the_prompt_that_was_trained(shipped, messages):
    chat, tokenizer = shipped
    prompt = jinja_of(messages, tokenizer, add_generation_prompt=True)["input_ids"]
    turns = [Message(m["role"], m["content"]) for m in messages]
    assert prompt == chat.encoder.prompt(turns, "it")


@pytest.fixture(scope="module")
def shipped(base):
    """The shipped base, ready for chat, with a system message per language."""
    chat = chat_tokenizer(ModelSection(base=base), ChatSection(default_system={"it": "Sii breve.", "en": "Be brief."}))
    return chat, chat.load()


@examples(40)
@given(MESSAGES, st.sampled_from(["it", "en", "fr", None]))
def test_default_system_by_language(shipped, messages, language):
    _, tokenizer = shipped
    rendered = jinja_of(messages, tokenizer, **({"language": language} if language else {}))
    assert rendered["input_ids"] == segments_of(messages, tokenizer, language or "und")[0]


def test_a_default_system_for_undetermined_languages(base):
    systems = {"it": "Sii breve.", "und": "Be brief."}
    chat = chat_tokenizer(ModelSection(base=base), ChatSection(default_system=systems))
    for language in ("und", "it", "fr"):
        rendered = jinja_of([{"role": "user", "content": "x"}], chat.load(), language=language)["input_ids"]
        turns = (Message("user", "x"),)
        assert chat.encoder.conversations([Conversation(turns, language=language)])[0].ids == rendered


@examples(40)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_default_system_survives_jinja(text):
    source = to_jinja(load_template("chatml"), text)
    (rendered,), _ = render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=source)
    assert rendered == f"<|im_start|>system\n{text}<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"


@pytest.mark.parametrize("content", [None, ""])
def test_jinja_takes_a_turn_without_content(tokenizer, content):
    ids = jinja_of([{"role": "assistant", "content": content}], tokenizer)["input_ids"]
    assert ids == segments_of([{"role": "assistant", "content": ""}], tokenizer)[0]


@examples(40)
@given(MESSAGES)
def test_a_template_file_with_bos_and_long_headers(own_template, messages):
    ids, labels = segments_of(messages, own_template)
    rendered = jinja_of(messages, own_template, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == ids
    assert rendered["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels]


@pytest.fixture(scope="module")
def own_template(byte_base, llama3_file):
    return load_tokenizer(byte_base, template=llama3_file)


def test_a_template_file_has_exact_ids(own_template):
    start, end, eot, bos = 260, 261, 262, 258  # slots in the order of the file
    ids, labels = segments_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], own_template)
    header = [[start, *role, end, 256] for role in (b"user", b"assistant")]
    assert ids == [bos, *header[0], *b"a", eot, *header[1], *b"b", eot]
    assert [label for label in labels if label != IGNORE_INDEX] == [*b"b", eot]
    assert (own_template.eos_token_id, own_template.pad_token_id) == (eot, eot)


GOOD = """\
header: "<|a|>{role}\\n"
end: "<|b|>"
control_tokens: {"<|a|>": start, "<|b|>": end}
eos_token: "<|b|>"
pad_token: "<|b|>"
"""
TOOLS = """\
tools:
  offer: "<tools>{tools}"
  call: "<call>{call}"
  result: "{result}"
"""
BAD = {
    "typo": (GOOD + "seperator: x\n", r":6: unknown key `seperator`"),
    "no role": (GOOD.replace("{role}", "role"), r":1: `header` must be .*"),
    "two roles": (GOOD.replace("{role}", "{role}{role}"), r":1: `header` contains \{role\} more than once"),
    "missing end": (GOOD.replace('end: "<|b|>"\n', ""), r": the key `end` is missing"),
    "uncontrolled end": (GOOD.replace('end: "<|b|>"', 'end: "<|c|>"'), r":2: `end` is not in control_tokens"),
    "uncontrolled eos": (
        GOOD.replace('eos_token: "<|b|>"', 'eos_token: "<|c|>"'),
        r":4: `eos_token` is not in control_tokens",
    ),
    "eos is not end": (GOOD.replace('eos_token: "<|b|>"', 'eos_token: "<|a|>"'), r":4: turns end with <\|b\|>"),
    "no words": (GOOD.replace("start", '""'), r":3: .*must not be empty"),
    "duplicate key": (GOOD + 'end: "<|b|>"\n', r":6: `end` is given twice"),
    "not yaml": ('header: "', r":1: "),
    "a list": ("- header\n", r":1: "),
    "empty": ("", r":1: "),
    "two tools": (
        GOOD + TOOLS.replace("{tools}", "{tools}{tools}"),
        r":7: `tools.offer` contains \{tools\} more",
    ),
    "no call": (GOOD + TOOLS.replace("{call}", "x"), r":8: .*call"),
    "control tags": (GOOD + TOOLS.replace("<call>", "<|b|>"), r":8: `tools.call` contains a control token"),
    "no start": (GOOD.replace('header: "<|a|>{role}\\n"\n', ""), r": the key `header` is missing, and turns of system"),
    "end of the assistant": (
        GOOD + 'turns: {assistant: {end: "<|a|>"}}\n',
        r":6: `turns.assistant.end` has no effect; set `end`",
    ),
    "prompt alone": (GOOD + 'prompt: "x"\n', r":6: `prompt` is not in the answers of conversations"),
    "two systems": (GOOD + 'system: {text: "{system}{system}"}\n', r":6: `system.text` contains \{system\} more"),
    "system without text": (GOOD + "system: {text: x}\n", r":6: `system.text` must"),
    "a call without arguments": (GOOD + TOOLS.replace("{call}", "{name}"), r":8: .*call"),
    "a control token in the offer": (GOOD + TOOLS.replace("<tools>", "<|a|>"), r":7: `tools.offer` contains a control"),
    "wrong history": (GOOD + 'reasoning: {start: "a", end: "b", history: hide}\n', r":6: `reasoning.history` must be"),
    "wrong type": (GOOD + "bos: maybe\n", r":6: `bos` must be true or false"),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_a_wrong_template_file_is_told_with_its_line(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=expected) as error:
        load_template(str(path))
    assert error.value.problems[0].where.startswith(str(path))


def test_a_good_template_file_loads(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert load_template(str(path)).header_of("user") == "<|a|>user\n"


def test_unknown_names_are_answered_with_what_there_is(tmp_path):
    with pytest.raises(RecipeError, match="did you mean `chatml`"):
        load_template("chat_ml")
    with pytest.raises(RecipeError, match="use chatml"):
        load_template("zzzzzz")
    with pytest.raises(RecipeError, match="there is no template"):
        load_template(str(tmp_path / "absent.yaml"))
