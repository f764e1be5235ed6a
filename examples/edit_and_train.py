"""Edit a recipe, see what it will do, and train it.

python examples/edit_and_train.py [--steps 300]
"""

import argparse

from nesso_tune import Sampling, World, generate, load_recipe, make_plan, prepare_data, preview, train


def main(steps: int) -> None:
    recipe = load_recipe("quickstart/sft").replace(
        {
            "output_dir": "outputs/examples/edited",
            "train.num_epochs": None,
            "train.max_steps": steps,
            "train.learning_rate": 2e-3,  # the recipe has 1e-3
            "evaluation.samples": 10,
            "evaluation.train_samples": 0,
        }
    )

    # What it will do: the steps, and one packed row with the supervised tokens marked.
    data = prepare_data(recipe)
    plan = make_plan(recipe, World(1), data.volume)
    print(f"{plan.steps} steps on {len(data.train)} packed rows")
    print(preview(recipe, 1).to_text())

    result = train(recipe)
    print(result)
    print(result.history[["eval_loss", "eval_loss/it", "eval_loss/en"]].dropna())

    prompts = ["Qual è la capitale d'Italia?", "What is the capital of Italy?"]
    answers = generate(result.model_dir, prompts, sampling=Sampling(max_new_tokens=48))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{answer.text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    main(parser.parse_args().steps)
