"""Train on files in a format of your own: a function reads their rows.

python examples/custom_reader.py [--steps 300]
"""

import argparse
from pathlib import Path
from typing import Any

from nesso_tune import load_recipe, prepare_data, train

TICKETS = Path(__file__).resolve().parent / "data" / "tickets.jsonl"
ROLES = {"Customer": "user", "Agent": "assistant"}


def ticket(row: dict[str, Any]) -> dict[str, Any] | None:
    """A support ticket as messages: its log has a line for each turn. None leaves out a ticket that is open."""
    if row["status"] != "solved":
        return None
    turns = [line.split(": ", 1) for line in row["log"].splitlines()]
    return {"messages": [{"role": ROLES[who], "content": text} for who, text in turns], "language": row["lang"]}


def main(steps: int) -> None:
    recipe = load_recipe("quickstart/sft").replace(
        {
            "output_dir": "outputs/examples/tickets",
            "data.sources": [
                {"path": "recipes/quickstart/data/conversations.jsonl"},
                {"path": str(TICKETS), "format": f"{Path(__file__).resolve()}:ticket", "alias": "tickets"},
            ],
            "train.num_epochs": None,
            "train.max_steps": steps,
            "evaluation.samples": 10,
            "evaluation.train_samples": 0,
        }
    )
    report = prepare_data(recipe).summary
    print(f"{report.rows_kept} of {report.rows_read} rows kept; dropped: {dict(report.dropped)}")
    print(train(recipe))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    main(parser.parse_args().steps)
