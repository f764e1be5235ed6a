"""The reasoning of an example, and answers that a template writes otherwise than the model generates them."""

from __future__ import annotations

from dataclasses import replace

from nesso_tune.chat.render import NO_REASONING_FORMAT, unreachable_answer
from nesso_tune.chat.template import ChatTemplate
from nesso_tune.conversation import Conversation, Message, PreferencePair
from nesso_tune.data.convert import Example
from nesso_tune.errors import DataError, RecipeError
from nesso_tune.recipes.sections import DPOData, SFTData


def check_reasoning(data: SFTData | DPOData, template: ChatTemplate) -> None:
    """Raises RecipeError if the recipe keeps reasoning and the template cannot write what a model would generate."""
    if data.reasoning != "keep":
        return
    if template.reasoning is None:
        what, remedy = NO_REASONING_FORMAT
        raise RecipeError("data.reasoning", f"keep has no effect: the chat template {what.partition(',')[0]}", remedy)
    if template.prompt:
        raise RecipeError(
            "data.reasoning", "keep contradicts the chat template, whose prompts end with an empty reasoning",
            "set it to drop, or use a template that generates reasoning, such as qwen3",
        )  # fmt: skip


def apply_reasoning(example: Example, data: SFTData | DPOData, template: ChatTemplate, where: str) -> Example:
    """The example with its reasoning kept or removed, as `data.reasoning` says.

    Raises:
        DataError: at the first example with reasoning if the recipe does not say what becomes of it, and at the first
            conversation with a supervised answer that the template writes otherwise than the model generates it.
    """
    if isinstance(example, Conversation):
        if isinstance(data, SFTData) and data.turns_to_train == "all":
            _check_turns(example, data, template, where)
        if not any(message.reasoning for message in example.messages):
            return example
        _check_choice(data, where)
        return example if data.reasoning == "keep" else replace(example, messages=_without(example.messages))
    if not isinstance(example, PreferencePair) or not any(message.reasoning for message in example.turns):
        return example
    _check_choice(data, where)
    if data.reasoning == "keep":
        return example
    chosen, rejected = _without((example.chosen, example.rejected))
    return replace(example, prompt=_without(example.prompt), chosen=chosen, rejected=rejected)


def _check_choice(data: SFTData | DPOData, where: str) -> None:
    if data.reasoning == "error":
        raise DataError(
            where, "an answer has reasoning, and data.reasoning does not say what becomes of it",
            "set data.reasoning: keep to train on it as the chat template writes it, or drop to remove it",
        )  # fmt: skip


def _check_turns(example: Conversation, data: SFTData, template: ChatTemplate, where: str) -> None:
    if (fault := unreachable_answer(example, template, data.roles_to_train)) is not None:
        raise DataError(
            where, f"{fault}: no prompt leads to them",
            "set data.turns_to_train: last, or give each answer a row of its own with the turns before it",
        )  # fmt: skip


def _without(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(replace(message, reasoning=None) if message.reasoning else message for message in messages)
