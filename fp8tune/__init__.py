"""fp8tune: float8 training exactly where it is faster, measured instead of guessed.

::

    model --screen--> Candidates --capture--> Samples --measure--> Measurements
          --consensus--> Measurements (the same on every rank) --decide--> a Plan
          --convert--> the model, frozen, then compiled
          cache and report record it

``AutoFloat8`` runs these stages inside a training run. Names are imported when they are
first used, so that importing fp8tune costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8tune.auto import AutoFloat8
    from fp8tune.config import (
        Objective,
        OnQuality,
        OnShapeChange,
        StaticFilter,
        Timing,
        TuneConfig,
    )
    from fp8tune.decision.reasons import Reason
    from fp8tune.decision.records import Decision, Signature, Verdict
    from fp8tune.errors import (
        AlreadyCompiledError,
        CacheError,
        CompiledTooEarlyError,
        ConfigError,
        ExportError,
        Fp8TuneError,
        MissingPackageError,
        ModelError,
        PhaseError,
        PlanMismatchError,
        RankMismatchError,
        UnknownRecipeError,
    )
    from fp8tune.plan.plan import Plan
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.recipes.registry import get_recipe, recipe_names, register_recipe
    from fp8tune.tuner.ahead import plan_ahead
    from fp8tune.tuner.phases import Phase

__version__ = "0.1.0"

_HOMES = {
    "AlreadyCompiledError": "errors",
    "AutoFloat8": "auto",
    "CacheError": "errors",
    "CompiledTooEarlyError": "errors",
    "ConfigError": "errors",
    "Decision": "decision.records",
    "ExportError": "errors",
    "Fp8TuneError": "errors",
    "MissingPackageError": "errors",
    "ModelError": "errors",
    "Objective": "config",
    "OnQuality": "config",
    "OnShapeChange": "config",
    "Phase": "tuner.phases",
    "PhaseError": "errors",
    "Plan": "plan",
    "PlanMismatchError": "errors",
    "RankMismatchError": "errors",
    "Reason": "decision.reasons",
    "Recipe": "recipes",
    "Signature": "decision.records",
    "StaticFilter": "config",
    "Timing": "config",
    "TuneConfig": "config",
    "UnknownRecipeError": "errors",
    "Verdict": "decision.records",
    "get_recipe": "recipes",
    "plan_ahead": "tuner.ahead",
    "recipe_names": "recipes",
    "register_recipe": "recipes",
}

__all__ = [
    "AlreadyCompiledError",
    "AutoFloat8",
    "CacheError",
    "CompiledTooEarlyError",
    "ConfigError",
    "Decision",
    "ExportError",
    "Fp8TuneError",
    "MissingPackageError",
    "ModelError",
    "Objective",
    "OnQuality",
    "OnShapeChange",
    "Phase",
    "PhaseError",
    "Plan",
    "PlanMismatchError",
    "RankMismatchError",
    "Reason",
    "Recipe",
    "Signature",
    "StaticFilter",
    "Timing",
    "TuneConfig",
    "UnknownRecipeError",
    "Verdict",
    "get_recipe",
    "plan_ahead",
    "recipe_names",
    "register_recipe",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
