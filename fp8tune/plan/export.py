"""A plan in the words of other trainers: exact names, substrings, and text to paste.

What the targets take:

- torchao and accelerate call a filter function for each Linear; for experts and mxfp8
  torchao takes the names of Parameters, see ``fp8tune.plan.quantize``;
- torchtitan's ``Float8LinearConverter`` and NeMo Automodel's ``FP8Config`` take
  ``filter_fqns`` and skip each Linear whose name contains one of these substrings, so
  that ``layers.1`` also skips ``layers.10``;
- Megatron-LM takes globs in order, see ``fp8tune.plan.megatron``;
- OLMo-core's ``Float8Config`` takes ``modules_to_ignore``: exact names, and it raises on
  those that match nothing. It never converts ``lm_head.w_out``.
"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING

from fp8tune.decision.gemms import CASTS, base_of, gemms_of
from fp8tune.decision.records import Verdict
from fp8tune.errors import ExportError
from fp8tune.plan import megatron
from fp8tune.plan.excludes import (
    exact_fqns,
    linears_of,
    refuse_experts,
    substring_excludes,
)
from fp8tune.plan.quantize import MX_RECIPES, converted_experts, quantize_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.decision.records import Decision
    from fp8tune.plan.plan import Plan

__all__ = [
    "TARGETS",
    "export_lines",
    "single_recipe",
]


def export_lines(plan: Plan, target: str) -> list[str]:
    """A plan as text to paste into a program or configuration of the target.

    Args:
        plan: made with a recipe of torchao.
        target: a key of ``TARGETS``.

    Returns:
        Lines of text that do not need fp8tune.

    Raises:
        ExportError: the target is unknown, does not know the recipe, or cannot say this
            plan.
    """
    if target not in TARGETS:
        raise ExportError(
            f"unknown target {target!r}; choose one of {', '.join(sorted(TARGETS))}"
        )
    recipes, write = TARGETS[target]
    recipe = single_recipe(plan)
    if target not in _TAKE_EXPERTS:
        refuse_experts(plan)
    known = base_of(recipe) if target in _TAKE_PARTS else recipe
    if known not in recipes:
        raise ExportError(
            f"the plan was made with the recipe {recipe!r}, and {target} knows "
            f"{', '.join(recipes)}; tune with one of these"
        )
    summary = textwrap.wrap(plan.summary(), 78)
    return [*(f"# {line}" for line in summary), *write(plan, recipe)]


def single_recipe(plan: Plan) -> str:
    """Name of the one recipe that the plan converts to; targets take no more.

    Raises:
        ExportError: it converts some layers to one recipe and some to another.
    """
    used = {x.recipe or plan.recipe for x in plan.decisions if _is_float8(x)}
    if len(used) > 1:
        raise ExportError(
            f"the plan converts to several recipes ({', '.join(sorted(used))}), and only "
            "plan.apply(model) can do that; tune with one recipe"
        )
    return used.pop() if used else plan.recipe.split(",")[0]


def _is_float8(decision: Decision) -> bool:
    return decision.verdict is Verdict.CONVERTED


def _torchao(plan: Plan, recipe: str) -> list[str]:
    if recipe in MX_RECIPES:
        return quantize_lines(plan, recipe)
    experts = converted_experts(plan)
    if not experts:
        return _float8_linears(plan, recipe)
    linears = len(experts) < len(plan.converted_fqns)
    return [
        *(_float8_linears(plan, recipe) if linears else []),
        *([""] if linears else []),
        *quantize_lines(plan, recipe),
    ]


def _float8_linears(plan: Plan, recipe: str) -> list[str]:
    return [
        "from dataclasses import replace",
        "",
        "from torchao.float8 import Float8LinearConfig, convert_to_float8_training",
        "",
        *_filter_function(plan, recipe),
        "convert_to_float8_training(model, config=config, module_filter_fn=is_float8)",
    ]


def _accelerate(plan: Plan, recipe: str) -> list[str]:
    return [
        "from dataclasses import replace",
        "",
        "from accelerate import Accelerator",
        "from accelerate.utils import AORecipeKwargs",
        "from torchao.float8 import Float8LinearConfig",
        "",
        *_filter_function(plan, recipe),
        "recipe = AORecipeKwargs(config=config, module_filter_func=is_float8)",
        'accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])',
    ]


def _filter_function(plan: Plan, recipe: str) -> list[str]:
    experts = set(converted_experts(plan))
    linears = [x for x in plan.converted_fqns if x not in experts]
    return [
        "FLOAT8_FQNS = {",
        *(f"    {json.dumps(fqn)}," for fqn in linears),
        "}",
        "",
        "",
        "def is_float8(module, fqn):",
        "    return fqn in FLOAT8_FQNS",
        "",
        "",
        f'config = Float8LinearConfig.from_recipe_name("{base_of(recipe)}")',
        "config = replace(config, pad_inner_dim=True)  # M need not divide by 16",
        *_part_lines(recipe),
    ]


def _part_lines(recipe: str) -> list[str]:
    """Switches the casts of the other GEMMs off, where only some are converted."""
    gemms = gemms_of(recipe)
    off = [x for x in CASTS if x not in gemms] if gemms else []
    lines = [
        f"    {cast}=CastConfig(off, target_dtype=config.{cast}.target_dtype),"
        for gemm in off
        for cast in CASTS[gemm]
    ]
    if not lines:
        return []
    what = f"# in high precision: {', '.join(off)}"
    imported = "from torchao.float8.config import CastConfig, ScalingType"
    return [
        what,
        imported,
        "off = ScalingType.DISABLED",
        "config = replace(",
        "    config,",
        *lines,
        ")",
    ]


def _torchtitan(plan: Plan, recipe: str) -> list[str]:
    return [
        "Float8LinearConverter.Config(",
        f'    recipe_name="{recipe}",',
        *_listed("filter_fqns", _all_substrings(plan)),
        ")",
    ]


def _automodel(plan: Plan, recipe: str) -> list[str]:
    names = [f"  - {json.dumps(x)}" for x in _all_substrings(plan)]
    return [
        "fp8:",
        "  enabled: true",
        f"  recipe_name: {recipe}",
        f"  filter_fqns:{'' if names else ' []'}",
        *names,
    ]


def _olmo(plan: Plan, recipe: str) -> list[str]:
    always_ignored = "lm_head.w_out"
    if always_ignored in plan.converted_fqns:
        raise ExportError(
            f"the plan converts {always_ignored!r}, which OLMo-core never does; tune "
            f'with filter_fqns=["{always_ignored}"]'
        )
    names = exact_fqns(plan, linears_of(plan))
    return [
        "Float8Config(",
        f"    ao_recipe=AOFloat8LinearRecipe.{recipe},",
        *_listed("modules_to_ignore", names),
        ")",
    ]


def _all_substrings(plan: Plan) -> list[str]:
    return substring_excludes(plan, linears_of(plan))


def _listed(name: str, values: Sequence[str]) -> list[str]:
    return [f"    {name}=[", *(f"        {json.dumps(x)}," for x in values), "    ],"]


# Those that take torchao's config, in which each GEMM can be switched off.
_TAKE_PARTS = ("torchao", "accelerate")

# Those that can name Parameters, not only modules.
_TAKE_EXPERTS = ("torchao",)

_ALL_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")

TARGETS: dict[str, tuple[tuple[str, ...], Callable[[Plan, str], list[str]]]] = {
    "torchao": ((*_ALL_RECIPES, *MX_RECIPES), _torchao),
    "accelerate": (_ALL_RECIPES, _accelerate),
    "torchtitan": (("rowwise", "rowwise_with_gw_hp"), _torchtitan),
    "automodel": (_ALL_RECIPES, _automodel),
    "olmo": (_ALL_RECIPES, _olmo),
    "megatron": (tuple(megatron.RECIPES), megatron.lines),
}
