"""IFEval in Italian: whether answers follow instructions that a program can check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nesso_tune.conversation import Conversation, Message
from nesso_tune.evaluation.instructions import CHECKS, Arguments, is_followed, is_followed_loosely
from nesso_tune.evaluation.prompts import Row, answer_all
from nesso_tune.evaluation.results import AnsweredPrompt, Metric, TaskResult, mean_of
from nesso_tune.evaluation.suites import Task
from nesso_tune.generation.answers import Answer
from nesso_tune.generation.inference import ChatModel

LANGUAGE = "it"
MAX_NEW_TOKENS = 1280  # as lm-eval's task ifeval


@dataclass(frozen=True)
class Instructed:
    """A prompt with its instructions.

    Attributes:
        id: of the prompt.
        prompt: the user turn, instructions included.
        instructions: (id, arguments) of each.
    """

    id: str
    prompt: str
    instructions: tuple[tuple[str, Arguments], ...]


def parse_row(row: Row) -> Instructed:
    """A row `{"key", "prompt", "instruction_id_list", "kwargs"}`.

    Raises:
        KeyError, ValueError: if a column is missing, or an instruction is unknown or lacks an argument.
    """
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if len(ids) != len(arguments):
        raise ValueError(f"{len(ids)} instructions, but {len(arguments)} kwargs")
    instructions = []
    for name, given in zip(ids, arguments, strict=True):
        if name.removeprefix("it:") not in CHECKS:
            raise ValueError(f"unknown instruction `{name}`")
        kept = {key: value for key, value in (given or {}).items() if value is not None}
        if name.endswith("repeat_prompt"):
            kept.setdefault("prompt_to_repeat", row["prompt"])
        is_followed(name, kept, "prova", LANGUAGE)  # raises for a missing argument
        instructions.append((name, kept))
    return Instructed(str(row.get("key", "")), str(row["prompt"]), tuple(instructions))


def run(task: Task, prompts: Sequence[Instructed], model: ChatModel) -> TaskResult:
    """Answers of a model and the share of instructions and prompts that they follow."""
    conversations = [Conversation((Message("user", prompt.prompt),), language=LANGUAGE) for prompt in prompts]
    return score(prompts, answer_all(model, conversations, task.max_new_tokens or MAX_NEW_TOKENS))


def score(prompts: Sequence[Instructed], answers: Sequence[Answer], language: str = LANGUAGE) -> TaskResult:
    """`inst_level_*_acc`, the share of instructions that are followed, and `prompt_level_*_acc`, of prompts."""
    verdicts: dict[str, list[list[bool]]] = {"strict": [], "loose": []}
    for prompt, answer in zip(prompts, answers, strict=True):
        for kind, check in (("strict", is_followed), ("loose", is_followed_loosely)):
            verdicts[kind].append([check(name, given, answer.text, language) for name, given in prompt.instructions])
    metrics: dict[str, Metric] = {}
    numbers = range(len(prompts))
    for kind, followed in verdicts.items():
        shares = [sum(each) / len(each) for each in followed]
        metrics[f"inst_level_{kind}_acc"] = mean_of(shares, numbers, [len(each) for each in followed])
        metrics[f"prompt_level_{kind}_acc"] = mean_of([float(all(each)) for each in followed], numbers)
    shown = tuple(
        AnsweredPrompt(prompt.id, language, prompt.prompt, answer.text, answer.stopped, passed=all(loose))
        for prompt, answer, loose in zip(prompts, answers, verdicts["loose"], strict=True)
    )
    return TaskResult(metrics, shown)
