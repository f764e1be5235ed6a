"""What a model cannot do: packed rows, batches without padding, long positions. A run adapts to it, or stops."""

from __future__ import annotations

from dataclasses import replace

from nesso_tune.data.prepare import PreparedData, unpacked
from nesso_tune.errors import RecipeError
from nesso_tune.logs import logger
from nesso_tune.model.lm_head import ForwardPath, LossPair
from nesso_tune.model.loading import compile_problem
from nesso_tune.planning.auto import Recorded
from nesso_tune.planning.plan import Plan, World
from nesso_tune.planning.planner import make_plan
from nesso_tune.recipes.schema import Recipe, SFTRecipe


def adapt_to_model(
    path: ForwardPath, kernel: str, recipe: Recipe, data: PreparedData, plan: Plan, recorded: Recorded
) -> tuple[Recipe, PreparedData, Plan]:
    """Recipe, data and plan as this model can train them: unpacked, or without compiled layers, where necessary.

    Raises:
        RecipeError: if the model cannot be sharded, or documents are longer than its position embeddings.
    """
    for note in _forward_notes(path, recipe, plan, kernel):
        logger.warning(note)
    if isinstance(recipe, SFTRecipe) and recipe.data.packing and not path.supports_packing:
        recipe, data, plan = _without_packing(recipe, data, plan, path, recorded)
    _check_positions(path, recipe, data, plan)
    if plan.torch_compile and recipe.train.torch_compile == "auto" and (problem := compile_problem()) is not None:
        logger.warning(f"torch_compile: {problem}: layers are not compiled")
        plan = replace(plan, torch_compile=False)
    return recipe, data, plan


def _without_packing(
    recipe: SFTRecipe, data: PreparedData, plan: Plan, path: ForwardPath, recorded: Recorded
) -> tuple[SFTRecipe, PreparedData, Plan]:
    """Recipe, data and plan of the same run with one conversation per row."""
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})
    rows, data = len(data.train), unpacked(data, recipe)
    steps, plan = (
        plan.steps,
        make_plan(own, World(plan.processes, plan.gpu, plan.per_node), data.volume, recorded=recorded),
    )
    logger.warning(
        f"data.packing: this model does not isolate packed documents{_compared(path.packing_losses, 'packed')}: "
        f"training on one conversation per row, {len(data.train):,} rows per epoch instead of {rows:,}, "
        f"{plan.steps:,} steps instead of {steps:,}"
    )
    return own, data, plan


def _check_positions(path: ForwardPath, recipe: Recipe, data: PreparedData, plan: Plan) -> None:
    """Raises RecipeError if a document is longer than the learned position embeddings of the model."""
    if path.max_positions is None:
        return
    longest = max(
        int(rows.documents.sequence_lengths[rows.documents.kept].max(initial=0))
        for rows in (data.train, data.validation)
    )
    if plan.torch_compile:  # rows are padded to this length, as more documents
        longest = max(longest, recipe.data.sequence_len)
    if longest > path.max_positions:
        raise RecipeError(
            "data.sequence_len", f"a document has {longest:,} tokens, the model has {path.max_positions:,} positions",
            f"set it to {path.max_positions} or less (data.too_long decides what happens to longer documents)",
        )  # fmt: skip


def _forward_notes(path: ForwardPath, recipe: Recipe, plan: Plan, kernel: str) -> list[str]:
    """What is slower with this model than with others.

    Raises:
        RecipeError: if it cannot be sharded.
    """
    notes = []
    if not path.padding_free and recipe.model.attention != "eager":
        notes.append(f"attention: {kernel}: this model does not support padding-free batches; using padding")
    if path.head == "own":
        figures = _compared(path.head_losses, "by the LM head alone")
        notes.append(f"head: this model's logits are not only its LM head{figures}: using its own forward (slower)")
    if recipe.evaluation is not None and path.generation != "batch":
        cache = " and without a KV cache" if path.generation == "uncached" else ""
        notes.append(f"evaluation: padding changes this model's answers: generating one prompt at a time{cache}")
    if path.padding == "alone" and plan.sharded:
        raise RecipeError(
            "distributed.fsdp",
            "this model processes one row at a time, so ranks with fewer rows would miss collective operations",
            "set distributed.fsdp: none",
        )
    return notes


def _compared(figures: LossPair | None, method: str) -> str:
    return f" (loss of some tokens {figures[0]:.5f} {method}, {figures[1]:.5f} by its own forward)" if figures else ""
