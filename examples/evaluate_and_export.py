"""Train a model, evaluate it on a suite of tasks, and export it.

python examples/evaluate_and_export.py [--steps 300] [--limit 20]
"""

import argparse
import subprocess
import sys

from nesso_tune import EvaluationOptions, evaluate, load_recipe, train


def main(steps: int, limit: int) -> None:
    recipe = load_recipe("quickstart/sft").replace(
        {
            "output_dir": "outputs/examples/exported",
            "train.num_epochs": None,
            "train.max_steps": steps,
            "evaluation": None,  # no evaluations during training
        }
    )
    result = train(recipe)

    # Several runs, model folders or hub ids are compared alike. The results are cached.
    (evaluated,) = evaluate(result.run_dir, "chat", EvaluationOptions(limit=limit))
    for name in ("bits_per_byte", "stop_rate", "language_fidelity"):
        print(f"{name}: {evaluated.metrics[f'chat/{name}'].value:.3f}")

    # The model folder loads in transformers as it is. `export` writes other precisions and formats, and compares the
    # answers with those of the run; `--to gguf` (with `pip install 'nesso-tune[gguf]'`) is for llama.cpp and Ollama.
    command = [sys.executable, "-m", "nesso_tune", "export", str(result.run_dir), "--to", "hf", "--dtype", "bfloat16"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--limit", type=int, default=20, help="prompts of the suite")
    options = parser.parse_args()
    main(options.steps, options.limit)
