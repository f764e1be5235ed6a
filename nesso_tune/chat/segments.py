"""A conversation as segments: what is a control token, what is template text, what is content, and what is learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from nesso_tune.chat.template import ChatTemplate, DefaultSystem, pieces_of
from nesso_tune.chat.tools import body_of, with_tools
from nesso_tune.conversation import UNKNOWN_LANGUAGE, Conversation, Message

TrainOnEos = Literal["turn", "all", "last", "none"]
BOS = "bos_token"  # stands for whatever the tokenizer calls its BOS


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: the piece.
        kind: `control` is one token looked up by name; `template` is fixed text; `content` comes from the data and
            is encoded so that no text in it can become a control token.
        trained: whether the model learns to write it.
        ends_turn: whether a turn is complete with this segment.
    """

    text: str
    kind: Literal["control", "template", "content"]
    trained: bool = False
    ends_turn: bool = False


def whole(conversation: Conversation, template: ChatTemplate, default_system: DefaultSystem) -> Conversation:
    """The conversation as it is written down: with the default system message, and with its tools in it."""
    return with_tools(with_default_system(conversation, default_system), template)


def with_default_system(conversation: Conversation, default_system: DefaultSystem) -> Conversation:
    """The conversation, opened by the default system message if it has no system message of its own."""
    if default_system is None or (conversation.messages and conversation.messages[0].role == "system"):
        return conversation
    if isinstance(default_system, Mapping):
        first = next(iter(default_system.values())) if conversation.language == UNKNOWN_LANGUAGE else None
        default_system = default_system.get(conversation.language, first)  # of a language not listed, none
        if default_system is None:
            return conversation
    system = Message("system", default_system)
    return replace(conversation, messages=(system, *conversation.messages))


def segments(
    conversation: Conversation,
    template: ChatTemplate,
    roles_to_train: Collection[str] = ("assistant",),
    train_on_eos: TrainOnEos = "turn",
) -> list[Segment]:
    """The rendered conversation. Learned are the contents of the trained turns and, by `train_on_eos`, end tokens."""
    trained = [
        message.role in roles_to_train if message.train is None else message.train for message in conversation.messages
    ]
    last = max((i for i, yes in enumerate(trained) if yes), default=-1)
    out = [Segment(BOS, "control")] if template.bos else []
    for i, message in enumerate(conversation.messages):
        learn_end = {"turn": trained[i], "all": True, "last": i == last, "none": False}[train_on_eos]
        out += _template_segments(template, template.header_of(message.role))
        out += answer_segments(body_of(message, template), template, trained[i], learn_end)
        out += _template_segments(template, template.separator)
    return out


def answer_segments(content: str, template: ChatTemplate, trained: bool, learn_end: bool) -> list[Segment]:
    """The content of a turn and its end."""
    text = [Segment(content, "content", trained)] if content else []
    end = _template_segments(template, template.end, learn_end)
    return [*text, *end[:-1], end[-1]._replace(ends_turn=True)]


def prompt_segments(conversation: Conversation, template: ChatTemplate) -> list[Segment]:
    """The rendered conversation up to where the assistant begins to write. Nothing of it is learned."""
    header = _template_segments(template, template.header_of("assistant"))
    return [*segments(conversation, template, roles_to_train=(), train_on_eos="none"), *header]


def _template_segments(template: ChatTemplate, text: str, trained: bool = False) -> tuple[Segment, ...]:
    return _pieces(text, tuple(template.control_tokens), trained)


@lru_cache(maxsize=256)  # a template has a few of them, a data set millions
def _pieces(text: str, control_tokens: tuple[str, ...], trained: bool) -> tuple[Segment, ...]:
    pieces = pieces_of(text, control_tokens)
    return tuple(Segment(piece, "control" if control else "template", trained) for piece, control in pieces)
