"""The model card: what the model is, what it was trained on, and how to talk to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nesso_tune.data.privacy import Privacy
from nesso_tune.data.report import DataReport
from nesso_tune.logs import visible
from nesso_tune.planning.plan import Plan
from nesso_tune.recipes.schema import Recipe

SHOWN = ("eval_loss", "stop_rate", "exact_match", "train_exact_match", "eval_rewards/accuracies", "closer_to_chosen")


RESULTS = "## Results on held-out data (train_: on training data)"


def model_card(
    recipe: Recipe, plan: Plan, report: DataReport, metrics: Mapping[str, Any], chosen: Sequence[str] = ()
) -> str:
    """README.md of `final/`, with the figures of the run. Private sources are left out.

    `chosen` says which of the run's weights these are, and why, where they are not the last ones by themselves.
    """
    hidden = Privacy(recipe.data).hidden_sources()
    public = [source.path for i, source in enumerate(recipe.data.sources) if i not in hidden]
    languages = [code for code in report.languages if code != "und"]
    front = ["---", *(["language:", *(f"- {code}" for code in languages)] if languages else []),
             "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nesso-tune",
             f"- {recipe.method}", "---"]  # fmt: skip
    sources = [f"- `{path}`" for path in public] + (["- private data"] if hidden else [])
    schedule = plan.schedule.in_words() if plan.schedule else ""
    figures = [f"| {key} | {metrics[key]:.4g} |" for key in SHOWN if isinstance(metrics.get(key), (int, float))]
    lines = (
        [
            *front, "",
            f"# {recipe.output_dir.rstrip('/').rsplit('/', 1)[-1]}", "",
            f"Trained by {recipe.method.upper()} from `{recipe.model.base}` with nesso-tune.", "",
            "## Use", "", "```python", *SNIPPET, "```", "",
            "## Training", "",
            f"- {plan.steps:,} steps of {plan.global_batch} rows, {plan.epochs:.3g} epochs",
            *(f"- {text}" for text in chosen),
            f"- learning rate: {schedule}",
            f"- {report.rows_kept:,} rows, {report.supervised_tokens:,} supervised tokens", "",
            "Data:", "", *sources, "",
            *([RESULTS, "", "| metric | value |", "|---|---|", *figures, ""] if figures else []),
        ]
    )  # fmt: skip
    return "\n".join(map(visible, lines))


SNIPPET = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'folder = "."  # this folder, or its hub id',
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "model = AutoModelForCausalLM.from_pretrained(folder)",
    'messages = [{"role": "user", "content": "Ciao! Chi sei?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
    "output = model.generate(**inputs, max_new_tokens=256)",
    'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
)
