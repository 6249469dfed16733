"""What Inductor is told: what the user asked for, and what recipes need.

A recipe may have an attribute ``inductor_settings``, options of Inductor by name, without
which its compiled numerics are not to be trusted. They hold for everything that is
compiled together: both variants of a Linear that is timed, and the model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fp8tune.recipes.recipe import Recipe

__all__ = ["settings_of", "spelled_out", "unset", "with_recipe_settings"]

_INDUCTOR = "inductor"


def settings_of(recipes: Iterable[Recipe]) -> dict[str, Any]:
    """The options of Inductor that any of these recipes needs."""
    every = [getattr(x, "inductor_settings", {}) for x in recipes]
    return {name: value for settings in every for name, value in settings.items()}


def with_recipe_settings(
    options: Mapping[str, Any], recipes: Iterable[Recipe]
) -> dict[str, Any]:
    """Keyword arguments of torch.compile, with what the recipes need among them.

    Args:
        options: the user's; what they say about a setting wins.
        recipes: what Linears may be converted to.

    Returns:
        New keyword arguments; a ``mode`` is written out, since torch.compile takes
        either a mode or options. The same as given, where Inductor is not the backend.
    """
    settings = settings_of(recipes)
    if not settings or options.get("backend", _INDUCTOR) != _INDUCTOR:
        return dict(options)
    plain = spelled_out(options)
    return {**plain, "options": {**settings, **plain["options"]}}


def spelled_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same keyword arguments of torch.compile without ``mode``, all in ``options``."""
    kept = {name: value for name, value in options.items() if name != "mode"}
    mode = _options_of_mode(options.get("mode") or "default")
    return {**kept, "options": {**mode, **(options.get("options") or {})}}


def _options_of_mode(mode: str) -> dict[str, Any]:
    # Slow to import. Public in spite of its name: torch.compile's documentation has it.
    return importlib.import_module("torch._inductor").list_mode_options(mode)


def unset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that do not hold for the whole process."""
    config = importlib.import_module("torch._inductor.config")
    return {k: v for k, v in settings.items() if getattr(config, k, None) != v}
