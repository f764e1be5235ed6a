"""Measure answers with a metric of your own, and keep the weights that are best by it.

python examples/custom_metric.py [--steps 300]
"""

import argparse

from nesso_tune import Answer, answer_metric, load_recipe, train


@answer_metric(better="higher")
def one_sentence(answer: Answer) -> bool:
    """Share of answers that end after one sentence."""
    return answer.stopped and answer.text.count(".") == 1


def main(steps: int) -> None:
    recipe = load_recipe("quickstart/sft").replace(
        {
            "output_dir": "outputs/examples/metric",
            "train.num_epochs": None,
            "train.max_steps": steps,
            "train.best_metric": "one_sentence",
            "evaluation.samples": 10,
            "evaluation.train_samples": 0,
        }
    )
    # A second metric, measured in this run alone and not known to `train.best_metric`.
    result = train(recipe, metrics={"words": lambda answer: len(answer.text.split())})
    print(result.history[["one_sentence", "one_sentence/it", "one_sentence/en", "words"]].dropna())
    print(f"curves: {result.report}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    main(parser.parse_args().steps)
