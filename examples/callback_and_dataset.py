"""Train on data sets in memory, with a callback that ends the run.

python examples/callback_and_dataset.py [--steps 300] [--loss 0.05]
"""

import argparse
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nesso_tune import load_recipe, train

CAPITALS = [("Italia", "Italy", "Roma", "Rome"), ("Francia", "France", "Parigi", "Paris"),
            ("Spagna", "Spain", "Madrid", "Madrid"), ("Grecia", "Greece", "Atene", "Athens"),
            ("Svezia", "Sweden", "Stoccolma", "Stockholm"), ("Polonia", "Poland", "Varsavia", "Warsaw")]  # fmt: skip


class StopAtLoss(TrainerCallback):  # type: ignore[misc]
    """Ends the run, with a last evaluation and `final/`, when the loss is low enough."""

    def __init__(self, loss: float) -> None:
        self.loss = loss

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop |= kwargs["logs"].get("loss", self.loss) < self.loss
        return control


def rows(ask_it: str, ask_en: str) -> Dataset:
    found = []
    for paese, country, capitale, capital in CAPITALS:
        found.append({"prompt": f"{ask_it} {paese}?", "response": f"La capitale: {capitale}.", "language": "it"})
        found.append({"prompt": f"{ask_en} {country}?", "response": f"The capital: {capital}.", "language": "en"})
    return Dataset.from_list(found)


def main(steps: int, loss: float) -> None:
    changes = {"output_dir": "outputs/examples/capitals", "train.num_epochs": None, "train.max_steps": steps,
               "logging.every_steps": 1, "evaluation.samples": 12, "evaluation.train_samples": 0}  # fmt: skip
    result = train(
        load_recipe("quickstart/sft").replace(changes),
        train_dataset=rows("Qual è la capitale:", "What is the capital of"),
        eval_dataset=rows("Dimmi la capitale:", "Tell me the capital of"),
        callbacks=[StopAtLoss(loss)],
    )
    print(result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--loss", type=float, default=0.05, help="training loss below which the run ends")
    options = parser.parse_args()
    main(options.steps, options.loss)
