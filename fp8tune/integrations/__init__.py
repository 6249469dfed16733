"""Plans in the trainers that people use; one module per package, imported on demand.

::

    accelerate    the plan as a recipe for Accelerator
    lightning     a Callback for Trainer
    torchtitan    tune in one run, convert by the plan in the next
    transformers  a TrainerCallback for Trainer

Each module imports its package when it is itself imported or used, never earlier.
"""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from fp8tune.auto import AutoFloat8
from fp8tune.errors import ExportError, MissingPackageError
from fp8tune.plan.export import single_recipe
from fp8tune.plan.plan import Plan
from fp8tune.recipes.registry import get_recipe
from fp8tune.recipes.torchao import TorchaoRecipe
from fp8tune.store.environment import describe_environment
from fp8tune.tuner.phases import Phase

__all__ = ["float8_config", "needs", "resumed"]

_logger = logging.getLogger("fp8tune")


@contextmanager
def needs(package: str) -> Generator[None]:
    """Around the import of an optional package.

    Args:
        package: its name, which is also that of fp8tune's extra.

    Raises:
        MissingPackageError: it is not installed; one line says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        # A package may also lack one of its own.
        install = f"'fp8tune[{package}]'" if missing == package else missing
        raise MissingPackageError(
            f"fp8tune.integrations.{package} needs the package {missing!r}, which is not "
            f"installed; run: pip install {install}"
        ) from error


def float8_config(plan: Plan) -> Any:
    """The torchao Float8LinearConfig of a plan, for the device that will run it.

    Raises:
        ExportError: the plan's recipe is none of torchao's float8 ones, or it has several.
    """
    recipe = get_recipe(single_recipe(plan), "meta")
    if not isinstance(recipe, TorchaoRecipe):
        raise ExportError(
            f"the plan was made with the recipe {recipe.name!r}, which torchao does not "
            "know; tune with 'tensorwise', 'rowwise' or 'rowwise_with_gw_hp', or call "
            "plan.apply(model)"
        )
    return recipe.config


def resumed(
    module: nn.Module,
    state: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    *,
    retune: bool,
) -> AutoFloat8:
    """AutoFloat8 as a run begins or goes on.

    Args:
        module: the model.
        state: the tuning state of the checkpoint, if the run goes on from one with any.
        options: of AutoFloat8.
        retune: drop a plan that was measured on another kind of device.
    """
    plan = _plan_of(state) or options.get("plan")
    if plan is None:
        return _continued(AutoFloat8(module, **options), state)
    there, here = dict(plan.environment).get("device"), _device_name(module)
    if there != here and retune:
        _logger.info("the plan was measured on %s; tuning again on %s", there, here)
        return AutoFloat8(module, **options)
    if there != here:
        _logger.info("the plan was measured on %s and is kept on %s", there, here)
    if state and _is_under_way(state):
        return _continued(AutoFloat8(module, **options), state)
    given: dict[str, Any] = {**options, "plan": plan}
    if given.get("recipe", "auto") == "auto":  # which means others on another device
        given["recipe"] = plan.recipe
    return AutoFloat8(module, **given)


def _is_under_way(state: Mapping[str, Any]) -> bool:
    return state["phase"] in (Phase.WARMUP, Phase.TRIAL)


def _plan_of(state: Mapping[str, Any] | None) -> Plan | None:
    stored = state and state.get("plan")
    return Plan.from_dict(stored, "the checkpoint") if stored else None


def _continued(auto: AutoFloat8, state: Mapping[str, Any] | None) -> AutoFloat8:
    # Without candidates, or with a plan that was given, there is nothing to go on with.
    if state and auto.phase is not Phase.FROZEN:
        auto.load_tuning_state(state)
    return auto


def _device_name(module: nn.Module) -> str | None:
    device = next(module.parameters()).device
    return dict(describe_environment(device)).get("device")
