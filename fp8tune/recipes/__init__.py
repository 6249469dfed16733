"""What a layer can be converted to. Only this room imports torchao.

In come a name, a config or a recipe, and a device; out goes an object with the methods
of ``Recipe``, which converts a Linear in place and back.
"""

from fp8tune.model.convert import change_class, restore_class
from fp8tune.recipes.bf16 import BFloat16Linear, BFloat16Recipe
from fp8tune.recipes.recipe import Recipe
from fp8tune.recipes.registry import (
    Recipes,
    get_recipe,
    recipe_names,
    register_recipe,
    resolve_recipe,
    resolve_recipes,
)
from fp8tune.recipes.torchao import TorchaoRecipe

__all__ = [
    "BFloat16Linear",
    "BFloat16Recipe",
    "Recipe",
    "Recipes",
    "TorchaoRecipe",
    "change_class",
    "get_recipe",
    "recipe_names",
    "register_recipe",
    "resolve_recipe",
    "resolve_recipes",
    "restore_class",
]
