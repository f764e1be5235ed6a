"""When a run logs, evaluates and saves: the plan's intervals, and always at the end."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune.recipes.plan import Plan


class Pace(TrainerCallback):
    """Sets the trainer's flags after each optimizer step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Called by the trainer; the first step is logged too."""
        plan, step = self._plan, state.global_step
        last = step == plan.total_steps
        control.should_log = last or step == 1 or _due(step, plan.log_every)
        control.should_evaluate = plan.evaluate_every is not None and (last or _due(step, plan.evaluate_every))
        control.should_save = last or _due(step, plan.save_every)
        return control


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
