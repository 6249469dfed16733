"""What a Linear can be converted to, by name. Only recipe modules import torchao.

A recipe is bound to a device: on one without float8 GEMMs the torchao recipes emulate
them, which is exact but slow. One more recipe is one more class with the methods of
``Recipe`` and one call of ``register_recipe``.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, Float8LinearRecipeName

from fp8tune.errors import ConfigError, UnknownRecipeError
from fp8tune.recipes_bf16 import BFloat16Linear, BFloat16Recipe
from fp8tune.recipes_torchao import TorchaoRecipe
from fp8tune.records import Reason

__all__ = [
    "BFloat16Linear",
    "BFloat16Recipe",
    "Recipe",
    "Recipes",
    "TorchaoRecipe",
    "get_recipe",
    "recipe_names",
    "register_recipe",
    "resolve_recipe",
    "resolve_recipes",
]


@runtime_checkable
class Recipe(Protocol):
    """One way to convert a Linear, in place and back.

    Attributes:
        name: what the user calls it.
        reference: name of the dtype that it is compared with, for the report.
        settings: everything that changes its speed or numerics, as text; timings in the
            cache hold for equal settings only.
        emulated: whether the device lacks the GEMMs, so that only numerics are real.

    A recipe may also have ``inductor_settings`` (see ``fp8tune.inductor``), ``casts`` (see
    ``fp8tune.casts``) and ``has_static_filter``: True if its ``static_filter`` has
    thresholds of torchao's, so that tables compare with them.
    """

    name: str
    reference: str
    settings: str
    emulated: bool

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Why this Linear cannot run with the recipe at all, or None if it can."""
        ...

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Why a published table calls this K, N not worth trying, or None."""
        ...

    def convert(self, linear: nn.Linear) -> None:
        """Switch a plain nn.Linear to the recipe, in place."""
        ...

    def revert(self, linear: nn.Linear) -> None:
        """Switch it back to a plain nn.Linear, in place."""
        ...


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
    if name == _AUTO or _SEPARATOR.strip() in name:
        raise ConfigError(
            f"a recipe cannot be called {name!r}: 'auto' stands for all recipes, and a "
            "comma stands between several; choose another name"
        )
    if name in _REGISTRY:
        raise ConfigError(f"recipe {name!r} is registered already; choose another name")
    _REGISTRY[name] = factory


def recipe_names() -> list[str]:
    """The names that can be passed as ``recipe``, sorted."""
    return sorted(_REGISTRY)


def get_recipe(name: str, device: torch.device | str) -> Recipe:
    """The registered recipe of that name for the device.

    Raises:
        UnknownRecipeError: nobody registered the name; the message lists the known.
    """
    if name not in _REGISTRY:
        known = ", ".join(recipe_names())
        raise UnknownRecipeError(
            f"unknown recipe {name!r}; choose one of {known}, or pass a torchao "
            "Float8LinearConfig or a Recipe"
        )
    return _REGISTRY[name](_running_device(torch.device(device)))


def _running_device(device: torch.device) -> torch.device:
    """Where a model will run that has no weights yet; whether float8 is emulated."""
    if device.type != "meta":
        return device
    return torch.accelerator.current_accelerator() or torch.device("cpu")


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

    Attributes:
        name: their names, as one string.
        reference: names of the dtypes that they are compared with, as one string.
        emulated: whether the device lacks the GEMMs of any.
    """

    def __init__(self, recipes: Sequence[Recipe]) -> None:
        self._recipes = tuple(recipes)
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

    def find(self, name: str) -> Recipe:
        """The recipe of that name.

        Raises:
            UnknownRecipeError: it is none of these.
        """
        for recipe in self._recipes:
            if recipe.name == name:
                return recipe
        raise UnknownRecipeError(f"no recipe {name!r} among {self.name}")


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
    if recipes == _AUTO:
        return _native_recipes(device)
    if isinstance(recipes, str):
        recipes = [name.strip() for name in recipes.split(_SEPARATOR.strip())]
    given = cast("Any", recipes) if isinstance(recipes, list | tuple) else [recipes]
    found = [resolve_recipe(x, device) for x in given]
    names = [x.name for x in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(
            f"recipe is {recipes!r}; expected one recipe or more, all of different names"
        )
    return Recipes(found)


def _native_recipes(device: torch.device | str) -> Recipes:
    found = [x for x in map(_available(device), recipe_names()) if x is not None]
    native = [x for x in found if not x.emulated]
    if not native:
        raise ConfigError(f"no recipe runs on {device} without emulation; name one")
    return Recipes(native)


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


def _mx_factory(mode: str) -> RecipeFactory:
    def build(device: torch.device) -> Recipe:
        # A prototype of torchao, which takes seconds to import.
        from fp8tune.recipes_mx import MXFP8Recipe  # noqa: PLC0415

        return MXFP8Recipe(f"mxfp8_{mode}", mode, device)

    return build


def _register_builtin() -> None:
    for member in Float8LinearRecipeName:
        register_recipe(member.value, _torchao_factory(member.value))
    register_recipe("bf16", lambda _: BFloat16Recipe())
    for mode in ("rceil", "floor"):
        register_recipe(f"mxfp8_{mode}", _mx_factory(mode))


_register_builtin()
