"""The templates of known families: the text of their official Jinja or documented format, its ids, exact masks.

TRL ships the official Jinja of Qwen3, Gemma 3 and Llama 3. The formats of Mistral, SmolLM3 and ChatML are written here.
"""

import json
from functools import partial
from pathlib import Path

import jinja2
import pytest
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template

from nesso_tune.chat.encoding import IGNORE_INDEX, ChatEncoder
from nesso_tune.chat.jinja import to_jinja
from nesso_tune.chat.render import prompt_segments, segments, with_system_and_tools
from nesso_tune.chat.template import load_template
from nesso_tune.conversation import Conversation
from tests.support.conversations import conversations
from tests.support.examples import EXAMPLES_FACTOR

COUNT = 100 * EXAMPLES_FACTOR  # 500 of each family with NESSO_TUNE_ALL=1
OFFICIAL = Path(trl.__file__).parent / "chat_templates"
BOS = "<s>"
THINKING = {"qwen3", "smollm3", "mistral"}
NO_TOOLS = {"gemma3", "llama3"}
# Pieces that a token stays within, as in the tokenizers of Llama 3, Qwen and Mistral: line breaks are one of them
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAGS = {  # tokens of a family's tokenizer that are no control tokens
    "qwen3": ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "smollm3": ("<think>", "</think>", "<tool_call>", "</tool_call>"),
}

CHATML_TOOLS = load_template("chatml").tools
SMOLLM3_SYSTEM = {
    "/think": load_template("smollm3").system.default, "/no_think": load_template("smollm3_nothink").system.default
}  # fmt: skip


def as_messages(conversation):
    """The messages as clients of a server write them."""
    out = []
    for m in conversation.messages:
        message = {"role": m.role, "content": m.content}
        if m.tool_calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in m.tool_calls]
        if m.reasoning is not None:
            message["reasoning_content"] = m.reasoning
        out.append(message)
    return out


def rendered(source, conversation, generation=False, **variables):
    texts, _ = render_jinja_template(
        [as_messages(conversation)], tools=list(conversation.tools) or None, chat_template=source,
        add_generation_prompt=generation, bos_token=BOS, eos_token="</s>", **variables,
    )  # fmt: skip
    return texts[0]


def official(name, conversation, generation=False, **variables):
    return rendered((OFFICIAL / f"{name}.jinja").read_text(encoding="utf-8"), conversation, generation, **variables)


def chatml(conversation, generation=False):
    """https://github.com/openai/openai-python/blob/v0.28.1/chatml.md, with the tools of the shipped template."""
    tools = CHATML_TOOLS
    turns = [(m.role, written_calls(m)) for m in conversation.messages]
    if conversation.tools:
        offer = tools.offer.replace("{tools}", "\n".join(map(to_json, conversation.tools)))
        system = f"{turns.pop(0)[1]}\n\n{offer}" if turns[0][0] == "system" else offer
        turns.insert(0, ("system", system))
    turns = [(r, f"<tool_response>\n{text}\n</tool_response>" if r == "tool" else text) for r, text in turns]
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return text + ("<|im_start|>assistant\n" if generation else "")


def smollm3(mode, conversation, generation=False):
    """The format of HuggingFaceTB/SmolLM3-3B on 8 July 2025; calls are text of the answer."""
    first, *rest = conversation.messages
    system = first.content.rstrip() if first.role == "system" else ""
    rest = rest if first.role == "system" else conversation.messages
    text = "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 08 July 2025\n"
    default = SMOLLM3_SYSTEM[mode]
    text += f"Reasoning Mode: {mode}\n\n## Custom Instructions\n\n{system or default}\n\n"
    if conversation.tools:
        text += "### Tools\n\nYou may call one or more functions to assist with the user query.\n"
        text += "You are provided with function signatures within <tools></tools> XML tags:\n\n<tools>\n"
        text += "".join(f"{tool}\n" for tool in conversation.tools)
        text += "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        text += '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        text += "<args-json-object>}\n</tool_call>\n\n<|im_end|>\n"
    header = "<|im_start|>assistant\n" + ("" if mode == "/think" else "<think>\n\n</think>\n")
    for m in rest:
        thought = (m.reasoning or "").strip("\n")
        content = written_calls(m)
        if m.role == "assistant" and thought:
            after = written_calls(m, content=m.content.lstrip("\n"))
            content = f"<think>\n{thought}\n</think>\n{after}"
        start = header if m.role == "assistant" else "<|im_start|>user\n"
        text += start + (content.lstrip("\n") if m.role == "assistant" else content) + "<|im_end|>\n"
    return text + (header if generation else "")


def mistral(conversation, generation=False):
    """Version 13 of mistral-common's instruct tokenizer, as text."""
    first, *rest = conversation.messages
    text = BOS + (f"[SYSTEM_PROMPT]{first.content}[/SYSTEM_PROMPT]" if first.role == "system" else "")
    if conversation.tools:
        text += f"[AVAILABLE_TOOLS]{to_json(list(conversation.tools))}[/AVAILABLE_TOOLS]"
    for m in rest if first.role == "system" else conversation.messages:
        if m.role == "user":
            text += f"[INST]{m.content}[/INST]"
        elif m.role == "tool":
            text += f"[TOOL_RESULTS]{m.content}[/TOOL_RESULTS]"
        else:
            text += f"[THINK]{m.reasoning}[/THINK]" if m.reasoning else ""
            text += m.content
            text += "".join(f"[TOOL_CALLS]{c['name']}[ARGS]{to_json(c['arguments'])}" for c in m.tool_calls) + "</s>"
    return text


def to_json(value):
    return json.dumps(value, ensure_ascii=False)


def written_calls(message, content=None):
    """The content, and the calls as text in the Hermes format."""
    content = message.content if content is None else content
    calls = [f"<tool_call>\n{to_json(call)}\n</tool_call>" for call in message.tool_calls]
    return "\n".join([*([content] if content or not calls else []), *calls])


FAMILIES = {
    "chatml": chatml,
    "llama3": partial(official, "llama3"),
    "gemma3": partial(official, "gemma3"),
    "qwen3": partial(official, "qwen3"),
    "qwen3_nothink": partial(official, "qwen3", enable_thinking=False),
    "qwen3_instruct": partial(official, "qwen3_instruct_2507"),
    "mistral": mistral,
    "smollm3": partial(smollm3, "/think"),
    "smollm3_nothink": partial(smollm3, "/no_think"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, template, its official rendering, conversations)"""
    name = request.param
    edges = name not in ("llama3", "mistral")  # the first is official without white space, the second keeps all
    made = conversations(7, COUNT, tools=name not in NO_TOOLS, reasoning=name in THINKING, edges=edges)
    return name, load_template(name), FAMILIES[name], made


def text_of(rendering):
    return "".join(BOS if s.text == "bos_token" and s.kind == "control" else s.text for s in rendering)


def before(conversation, number):
    """The conversation before its message `number`."""
    return Conversation(conversation.messages[:number], conversation.tools)


def answers(conversation):
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]


def test_the_text_of_spec_and_jinja_is_the_official_one(family):
    _, template, expected, made = family
    source = to_jinja(template)
    plain = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(source)
    differences = []
    for number, conversation in enumerate(made):
        last = answers(conversation)[-1]
        for part, generation in ((conversation, False), (before(conversation, last), True)):
            arranged = with_system_and_tools(part, template)
            spec = prompt_segments(arranged, template) if generation else segments(arranged, template, ())
            texts = {text_of(spec), expected(part, generation), rendered(source, part, generation)}
            if number % 10 == 0:
                variables = {"tools": list(part.tools) or None, "bos_token": BOS, "add_generation_prompt": generation}
                texts.add(plain.render(messages=as_messages(part), **variables))
            if len(texts) > 1:
                differences.append((number, generation, sorted(texts)))
    assert not differences, (len(differences), differences[0])


def test_masks_cover_what_is_generated_after_the_official_prompt(family):
    _, template, expected, made = family
    for conversation in made:
        arranged = with_system_and_tools(conversation, template)
        last = answers(conversation)[-1]
        learned = text_of(s for s in segments(arranged, template, turns_to_train="last") if s.trained)
        assert learned == generated(expected, conversation, last, template)
        if template.drops_history or template.prompt:
            continue
        learned = text_of(s for s in segments(arranged, template) if s.trained)
        assert learned == "".join(generated(expected, conversation, i, template) for i in answers(conversation))


def generated(expected, conversation, i, template):
    """What the model generates as message `i`: the official text with it, after the official prompt for it."""
    prompt, whole = expected(before(conversation, i), True), expected(before(conversation, i + 1))
    assert whole.startswith(prompt)
    return whole[len(prompt) :].removesuffix(template.separator)


@pytest.fixture(scope="module")
def encoded(family):
    """A tokenizer with the family's tokens, trained on its texts, as the encoder and as others use it."""
    name, template, expected, made = family
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[*dict.fromkeys([BOS, *template.control_tokens])],
    )  # fmt: skip
    texts = [message.content for conversation in made for message in conversation.messages]
    tokenizer.train_from_iterator([*texts, *(expected(c) for c in made[:50])], trainer)
    tokenizer.add_tokens([*TAGS.get(name.split("_")[0], ())])
    encoder = ChatEncoder(Tokenizer.from_str(tokenizer.to_str()), template, tokenizer.token_to_id(BOS))
    return tokenizer, encoder


def test_ids_are_those_of_the_official_text(family, encoded):
    """They differ only where white space at the start of a content merges with a line break of the header."""
    name, _, expected, made = family
    tokenizer, encoder = encoded
    merged = 0
    for conversation in made:
        ours = encoder.conversations([conversation], turns_to_train="last")[0]
        whole = tokenizer.encode(expected(conversation), add_special_tokens=False).ids
        ours_text, text = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (ours.ids, whole))
        assert ours_text == text
        if ours.ids == whole:
            continue
        assert any(m.content[:1].isspace() for m in conversation.messages), (ours.ids, whole)
        merged += 1
    assert merged <= (0 if name in ("llama3", "mistral", "gemma3") else COUNT // 2)
    print(f"{name}: {merged} of {COUNT} conversations with merged white space")


def test_prompts_are_the_beginning_of_training(family, encoded):
    _, encoder = encoded
    made = family[-1]
    for conversation in made[:100]:
        last = answers(conversation)[-1]
        prompt = encoder.prompt(conversation.messages[:last], "und", conversation.tools)
        whole = encoder.conversations([conversation], turns_to_train="last")[0]
        assert whole.ids[: len(prompt)] == prompt
        assert [label != IGNORE_INDEX for label in whole.labels].index(True) == len(prompt)
