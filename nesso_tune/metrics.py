"""The metrics of an evaluation by name: which way is better, and what each is measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from nesso_tune.errors import closest

Better = Literal["lower", "higher"]

# On held-out rows.
HELD_OUT: dict[str, Better] = {
    "eval_loss": "lower", "eval_token_accuracy": "higher", "eval_rewards/accuracies": "higher",
    "eval_rewards/margins": "higher",
}  # fmt: skip
# On the answers to prompts.
ANSWERS: dict[str, Better] = {
    "stop_rate": "higher", "exact_match": "higher", "language_fidelity": "higher", "closer_to_chosen": "higher",
    "repetition_rate": "lower",
}  # fmt: skip
ONLY = {  # what is measured by one method alone
    "eval_rewards/accuracies": "dpo", "eval_rewards/margins": "dpo",
    "closer_to_chosen": "dpo",
}  # fmt: skip
TRAIN = "train_"  # begins the name of what is measured on answers to prompts that were trained on


def whole_metric(name: str) -> str | None:
    """The metric over all that a name such as `eval_loss/it` or `stop_rate/source/NAME` is a part of.

    None for an unknown name.
    """
    prefix = TRAIN if name.startswith(TRAIN) else ""
    bare = name.removeprefix(prefix)
    for known in ANSWERS if prefix else {**HELD_OUT, **ANSWERS}:
        if bare == known or bare.startswith(f"{known}/"):
            return prefix + known
    return None


def better(name: str) -> Better | None:
    """Whether a metric is better when it is lower or higher; None where that is not known."""
    whole = whole_metric(name)
    return None if whole is None else {**HELD_OUT, **ANSWERS}[whole.removeprefix(TRAIN)]


def did_you_mean(name: str, measured: Iterable[str]) -> str:
    """The remedy for a metric that is not measured: those that are, and of which it is known which way is better."""
    names = [one for one in measured if better(one) is not None]
    guess = closest(name, names)
    return f"did you mean `{guess}`? There are {', '.join(names)}" if guess else f"use one of {', '.join(names)}"
