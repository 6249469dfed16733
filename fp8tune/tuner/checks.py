"""Arguments and models that cannot work are refused before anything is changed."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fp8tune.compiling.apply import is_compiled
from fp8tune.config import TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.errors import AlreadyCompiledError, ConfigError, ModelError
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.copies import is_guarded
from fp8tune.model.linears import dtype_name, named_gemms
from fp8tune.model.sharding import running_device
from fp8tune.plan.plan import Plan
from fp8tune.recipes.registry import Recipes
from fp8tune.report.messages import no_common_trial_line
from fp8tune.store.places import check_place

__all__ = [
    "check_arguments",
    "check_linears",
    "check_model",
    "check_plan_recipe",
    "check_recipe_fits",
    "warn_of_no_common_trial",
]

logger = logging.getLogger("fp8tune")


def check_arguments(
    *,
    warmup_steps: Any,
    filter_fqns: Any,
    compile: Any,
    config: Any,
    plan: Any,
    cache: Any = None,
) -> None:
    """Refuse what AutoFloat8 cannot have been meant to get.

    Raises:
        ConfigError: says which argument, what it is, and what it must be.
    """
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ConfigError(
            f"warmup_steps is {warmup_steps!r}; it must be a number of training steps, or "
            "0 to decide before the first one by a dry run"
        )
    if isinstance(filter_fqns, str) or not isinstance(filter_fqns, Sequence):
        raise ConfigError(
            f"filter_fqns is {filter_fqns!r}; it must be a list of substrings of names, "
            'for example ["output"]'
        )
    if not isinstance(compile, bool | Mapping) and not callable(compile):
        raise ConfigError(
            f"compile is {compile!r}; it must be a bool, a dict of torch.compile options "
            "or a callable that takes the module"
        )
    if not isinstance(config, TuneConfig):
        raise ConfigError(f"config is {config!r}; it must be a fp8tune.TuneConfig")
    check_place(cache)
    if plan is not None and not isinstance(plan, Plan):
        raise ConfigError(
            f"plan is {plan!r}; it must be a fp8tune.Plan, for example Plan.load(path)"
        )


def check_model(module: Any) -> torch.device:
    """Refuse a model in which nothing could be tuned.

    Returns:
        The device on which its first Linear runs that is not on the meta device.

    Raises:
        ModelError: no Linear, or Linears on the meta device.
        AlreadyCompiledError: a compiled region holds Linears.
    """
    devices = [running_device(linear) for linear in check_linears(module)]
    there = [x for x in devices if x.type != "meta"]
    if not there:
        raise ModelError(
            "the model is on the meta device and cannot be timed; materialise it first "
            "(weights that accelerate offloads are there too), or apply an earlier plan "
            "with Plan.apply"
        )
    return there[0]


def check_linears(module: Any) -> list[nn.Linear]:
    """The Linears of a model, on any device.

    Raises:
        ModelError: there are none, or another AutoFloat8 tunes some.
        AlreadyCompiledError: a compiled region holds some.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"module is {module!r}; it must be an nn.Module")
    linears = [linear for _, linear in named_gemms(module)]
    if not linears:
        raise ModelError(
            f"{type(module).__name__} holds no nn.Linear, so there is nothing to "
            "convert; pass the model that does"
        )
    _refuse_tuned(module)
    _refuse_compiled(module)
    return linears


def _refuse_tuned(module: nn.Module) -> None:
    if any(map(is_guarded, module.modules())):
        raise ModelError(
            "another AutoFloat8 tunes this model or a part of it; go on with that one, or "
            "end it before the model is wrapped again: its abandon() gives the model back "
            "in high precision"
        )


def _refuse_compiled(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if is_compiled(child) and any(named_gemms(child)):
            raise AlreadyCompiledError(
                f"{name or 'the model'} ({type(child).__name__}) is compiled already, so "
                "its Linears cannot be watched or reverted. Pass the model before "
                "torch.compile and give compile=True, a dict of options or a callable "
                "to AutoFloat8"
            )


def check_recipe_fits(
    screened: Sequence[Candidate | LeftOut], recipes: Recipes
) -> None:
    """Refuse recipes that take the weights of no layer.

    Raises:
        ModelError: every Linear that it looked at has a dtype that it does not take.
    """
    wrong = [x for x in screened if _has_wrong_dtype(x)]
    if wrong and not any(isinstance(x, Candidate) for x in screened):
        dtypes = {dtype_name(x.linear.weight.dtype) for x in wrong}
        raise ModelError(
            f"recipe {recipes.name!r} is compared with {recipes.reference} and does not "
            f"take the {', '.join(sorted(dtypes))} weights of this model's {len(wrong)} "
            f"Linears; convert the model first, for example with "
            f"model.to(torch.{recipes[0].reference})"
        )


def check_plan_recipe(plan: Plan, recipes: Recipes) -> None:
    """Refuse a plan that was made with another recipe.

    Raises:
        ConfigError: names both recipes.
    """
    if plan.recipe != recipes.name:
        raise ConfigError(
            f"the plan was made with recipe {plan.recipe!r}, and recipe is "
            f"{recipes.name!r}; pass recipe={plan.recipe!r} with this plan"
        )


def _has_wrong_dtype(record: Candidate | LeftOut) -> bool:
    return isinstance(record, LeftOut) and record.reason is Reason.UNSUPPORTED_DTYPE


def warn_of_no_common_trial(trial_steps: int | str, models: int) -> None:
    """Say that a trial which was asked for cannot be.

    Args:
        trial_steps: what was asked for.
        models: how many different lists of layers the ranks hold.
    """
    if isinstance(trial_steps, int) and trial_steps > 0 and models > 1:
        logger.warning("%s", no_common_trial_line(trial_steps))
