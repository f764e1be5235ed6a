"""Recipes: the schema, reading and checking files, and the plan of a run. Imports no torch."""

from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe

__all__ = ["DPORecipe", "Recipe", "SFTRecipe", "load_recipe"]
