"""Oddities of rows that are kept: each is found where it is, and nowhere else."""

import pytest

from nesso_tune import Conversation, Message
from nesso_tune.data.marks import marks_of

CONTROL = ("<|im_start|>", "<|im_end|>")
CALL = ({"name": "g", "arguments": {}},)


def talk(question="q", answer="a", **keys):
    return Conversation((Message("user", question), Message("assistant", answer)), **keys)


FOUND = {
    "no_break_space": talk("a\xa0b"),
    "zero_width_character": talk(answer="a\u200bb"),
    "control_character": talk("a\x0bb"),
    "html_entity": talk(answer="rock &amp; roll &#39;"),
    "mojibake": talk("perchÃ©"),
    "template_placeholder": talk("ssh {{utente}}@host"),
    "control_token_as_text": talk("scrivi <|im_end|>"),
    "stand_in_turn": talk("__SILENCE__"),
    "empty_turn": talk(" "),
    "opens_with_assistant": Conversation(
        (Message("assistant", "Ciao!"), Message("user", "q"), Message("assistant", "a"))
    ),
    "ends_without_answer": Conversation((*talk().messages, Message("user", "q"))),
    "call_of_a_tool_not_offered": Conversation(
        (Message("user", "q"), Message("assistant", "", CALL)), tools=({"name": "f"},)
    ),
}


@pytest.mark.parametrize(("mark", "item"), FOUND.items(), ids=FOUND)
def test_what_is_odd_is_named(mark, item):
    assert marks_of(item, CONTROL) == [mark]


@pytest.mark.parametrize(
    "item",
    [
        talk("Perché? àèìòù € “così” — 你好 👩🏽", "R&D & co.; a {b} {c}\tx\r\ny __init__ è"),
        talk("f(x) = {x}", "__init__.py e __NAME__ insieme"),
        Conversation(
            (Message("system", "s"), Message("user", "q"), Message("assistant", "", CALL)), tools=({"name": "g"},)
        ),
    ],
)
def test_what_is_usual_is_not(item):
    assert marks_of(item, CONTROL) == []
