"""What a Linear can be converted to, by name. Only recipe modules import torchao.

A recipe is bound to a device: on one without float8 GEMMs the torchao recipes emulate
them, which is exact but slow. One more recipe is one more class with the methods of
``Recipe`` and one call of ``register_recipe``.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torchao.float8 import Float8LinearConfig, Float8LinearRecipeName

from fp8tune.decision.gemms import base_of, gemms_of, is_part, part_name
from fp8tune.errors import ConfigError, UnknownRecipeError
from fp8tune.recipes.bf16 import BFloat16Recipe
from fp8tune.recipes.recipe import ByGemm, Recipe
from fp8tune.recipes.torchao import TorchaoRecipe

__all__ = [
    "Recipes",
    "get_recipe",
    "recipe_names",
    "register_recipe",
    "resolve_recipe",
    "resolve_recipes",
]


RecipeFactory = Callable[[torch.device], Recipe]

_REGISTRY: dict[str, RecipeFactory] = {}

# Between the names of several recipes, in a plan and where one string names them.
_SEPARATOR = ", "
_AUTO = "auto"


def register_recipe(name: str, factory: RecipeFactory) -> None:
    """Make a recipe known by name.

    Args:
        name: what users pass as ``recipe``.
        factory: called with the model's device, returns the recipe for it.

    Raises:
        ConfigError: the name is taken, or cannot be one.
    """
    if name == _AUTO or _SEPARATOR.strip() in name or is_part(name):
        raise ConfigError(
            f"a recipe cannot be called {name!r}: 'auto' stands for all recipes, a comma "
            "stands between several, and behind a colon are the GEMMs of one; choose "
            "another name"
        )
    if name in _REGISTRY:
        raise ConfigError(f"recipe {name!r} is registered already; choose another name")
    _REGISTRY[name] = factory


def recipe_names() -> list[str]:
    """The names that can be passed as ``recipe``, sorted."""
    return sorted(_REGISTRY)


def get_recipe(name: str, device: torch.device | str) -> Recipe:
    """The registered recipe of that name for the device.

    Behind a colon may be the GEMMs that it is to convert, as in
    "rowwise:output+grad_input"; the others stay in high precision.

    Raises:
        UnknownRecipeError: nobody registered the name; the message lists the known.
        ConfigError: it cannot convert these GEMMs by themselves.
    """
    if is_part(name):
        return _part_of(get_recipe(base_of(name), device), name)
    if name not in _REGISTRY:
        known = ", ".join(recipe_names())
        raise UnknownRecipeError(
            f"unknown recipe {name!r}; choose one of {known}, or pass a torchao "
            "Float8LinearConfig or a Recipe"
        )
    return _REGISTRY[name](_running_device(torch.device(device)))


def _part_of(whole: Recipe, name: str) -> Recipe:
    """The part of a recipe that is called ``name``."""
    gemms = gemms_of(name)
    if not isinstance(whole, ByGemm) or not set(gemms) <= set(whole.gemms):
        can = "+".join(whole.gemms) if isinstance(whole, ByGemm) else "all of them"
        raise ConfigError(
            f"recipe {whole.name!r} cannot convert only {'+'.join(gemms)}: it converts "
            f"{can}; choose among these, or another recipe"
        )
    return whole if gemms == whole.gemms else whole.only(gemms)


def _running_device(device: torch.device) -> torch.device:
    """Where a model will run that has no weights yet; whether float8 is emulated."""
    if device.type != "meta":
        return device
    # Without the check a torch that was built for CUDA says "cuda" where no driver is.
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def resolve_recipe(recipe: Any, device: torch.device | str) -> Recipe:
    """A name, a Float8LinearConfig or a Recipe -> the Recipe for the device.

    Raises:
        UnknownRecipeError: an unknown name.
        ConfigError: anything else, or a config that cannot be toggled in place.
    """
    if isinstance(recipe, str):
        return get_recipe(recipe, device)
    if isinstance(recipe, Float8LinearConfig):
        return TorchaoRecipe("custom", recipe, _running_device(torch.device(device)))
    if isinstance(recipe, Recipe) and not isinstance(recipe, type):
        return recipe
    raise ConfigError(
        f"recipe is {recipe!r}; expected a name ({', '.join(recipe_names())}), a torchao "
        "Float8LinearConfig, or an object with the attributes of fp8tune.Recipe"
    )


class Recipes(Sequence[Recipe]):
    """The recipes to choose from, in the user's order; the first is warmed up with.

    Args:
        recipes: at least one, of different names.
        given: what the user passed for them.

    Attributes:
        name: their names, as one string.
        reference: names of the dtypes that they are compared with, as one string.
        emulated: whether the device lacks the GEMMs of any.
    """

    def __init__(self, recipes: Sequence[Recipe], given: Any = None) -> None:
        self._recipes = tuple(recipes)
        self._given = list(recipes) if given is None else given
        self.names = [x.name for x in recipes]
        self.name = _SEPARATOR.join(self.names)
        self.reference = " or ".join(dict.fromkeys(x.reference for x in recipes))
        self.emulated = any(x.emulated for x in recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __getitem__(self, index: Any) -> Any:
        return self._recipes[index]

    def __iter__(self) -> Iterator[Recipe]:
        return iter(self._recipes)

    def on(self, device: torch.device) -> "Recipes":
        """What the user passed, for another device."""
        return resolve_recipes(self._given, device)

    def find(self, name: str) -> Recipe:
        """The recipe of that name, or the part of one of these.

        Raises:
            UnknownRecipeError: it is none of these.
        """
        for recipe in self._recipes:
            if recipe.name == name:
                return recipe
            if is_part(name) and recipe.name == base_of(name):
                return _part_of(recipe, name)
        raise UnknownRecipeError(f"no recipe {name!r} among {self.name}")

    def in_place_of(self, name: str | None) -> Recipe:
        """What a layer becomes for which a plan has a recipe of that name.

        A single one replaces whatever the plan was made with, in the same GEMMs.

        Raises:
            UnknownRecipeError: it is none of these, which are several.
            ConfigError: the single one cannot convert these GEMMs by themselves.
        """
        if len(self) > 1:
            return self.find(name or self.names[0])
        only: Recipe = self[0]
        if name in (None, only.name) or not is_part(name):
            return only
        return _part_of(only, part_name(only.name, gemms_of(name)))


def resolve_recipes(recipes: Any, device: torch.device | str) -> Recipes:
    """What users pass as ``recipe`` -> the recipes for the device.

    Args:
        recipes: what ``resolve_recipe`` takes, a sequence of that, names with commas
            between them, or "auto" for every registered recipe that the device runs
            without emulation.
        device: where the model is.

    Raises:
        UnknownRecipeError: an unknown name.
        ConfigError: anything else, two of one name, or none.
    """
    given: Any = recipes
    if recipes == _AUTO:
        return _native_recipes(device)
    if isinstance(recipes, str):
        recipes = [name.strip() for name in recipes.split(_SEPARATOR.strip())]
    several = cast("Any", recipes) if isinstance(recipes, list | tuple) else [recipes]
    found = [resolve_recipe(x, device) for x in several]
    names = [x.name for x in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(
            f"recipe is {recipes!r}; expected one recipe or more, all of different names"
        )
    return Recipes(found, given)


def _native_recipes(device: torch.device | str) -> Recipes:
    found = [x for x in map(_available(device), recipe_names()) if x is not None]
    native = [x for x in found if not x.emulated]
    if not native:
        raise ConfigError(f"no recipe runs on {device} without emulation; name one")
    return Recipes(native, _AUTO)


def _available(device: torch.device | str) -> Callable[[str], Recipe | None]:
    def find(name: str) -> Recipe | None:
        try:
            return get_recipe(name, device)
        except ConfigError:  # as where torchao is too old for it
            return None

    return find


def _torchao_factory(name: str) -> RecipeFactory:
    def build(device: torch.device) -> Recipe:
        config = Float8LinearConfig.from_recipe_name(name)
        # Backward contracts grad_weight over M, so without padding a last batch whose M
        # is no multiple of 16 would fail.
        padded = dataclasses.replace(config, pad_inner_dim=True)
        return TorchaoRecipe(name, padded, device)

    return build


def _mx_factory(name: str, mode: str, *, grad_weight_hp: bool) -> RecipeFactory:
    def build(device: torch.device) -> Recipe:
        # A prototype of torchao, which takes seconds to import.
        from fp8tune.recipes.mx import MXFP8Recipe  # noqa: PLC0415

        return MXFP8Recipe(name, mode, device, grad_weight_hp=grad_weight_hp)

    return build


def _blockwise(device: torch.device) -> Recipe:
    from fp8tune.recipes.blockwise import BlockwiseRecipe  # noqa: PLC0415 - as above

    return BlockwiseRecipe(device)


def _register_builtin() -> None:
    for member in Float8LinearRecipeName:
        register_recipe(member.value, _torchao_factory(member.value))
    register_recipe("bf16", lambda _: BFloat16Recipe())
    register_recipe("blockwise", _blockwise)
    for mode in ("rceil", "floor"):
        name = f"mxfp8_{mode}"
        register_recipe(name, _mx_factory(name, mode, grad_weight_hp=False))
    name = "mxfp8_rceil_wgrad_hp"
    register_recipe(name, _mx_factory(name, "rceil", grad_weight_hp=True))


_register_builtin()
