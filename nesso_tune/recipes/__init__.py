"""Recipes: schema, loading, validation and lint rules. Does not import torch."""

from nesso_tune.recipes.load import load_recipe
from nesso_tune.recipes.schema import DPORecipe, Recipe, SFTRecipe

__all__ = ["DPORecipe", "Recipe", "SFTRecipe", "load_recipe"]
