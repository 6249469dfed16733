"""A plan as Megatron-LM's ``--te-precision-config-file``: configs and ordered matchers.

The first enabled matcher whose glob fits a layer's name chooses its config
(megatron/core/quantization/quant_config.py, fields: TEQuantizationRecipe in
megatron/core/extensions/transformer_engine.py). A config overrides Megatron's own --fp8
arguments where they are given; where they are not it does so only if it says so.
Transformer Engine brings recipes of its own, so what was timed, torchao's kernels, are
not those that will run.
"""

from __future__ import annotations

import fnmatch
import glob
import json
from typing import TYPE_CHECKING

from fp8tune.decision.folding import without_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.decision.decisions import Decisions

__all__ = ["RECIPES", "lines"]

# Our recipes -> names of Transformer Engine's, which has none with a scale per row, and of
# the format: torchao's tensorwise has gradients in e5m2, as "hybrid" has.
RECIPES = {
    "tensorwise": ("tensorwise", "hybrid"),
    "blockwise": ("blockwise", "e4m3"),
    "mxfp8_rceil": ("mxfp8", "e4m3"),
    "mxfp8_floor": ("mxfp8", "e4m3"),
}


def lines(plan: Decisions, recipe: str) -> list[str]:
    """The YAML file.

    Args:
        plan: what to convert.
        recipe: a key of ``RECIPES``.
    """
    return [
        f"# timed: {recipe} of torchao, {plan.timing}; not Transformer Engine's kernels",
        "configs:",
        *_config("converted", _converted_to(*RECIPES[recipe])),
        *_config("reference", "{}"),
        "matchers:",
        *(
            line
            for i, pattern in enumerate(_globs(plan))
            for line in _matcher(f"converted_{i}", pattern, "converted")
        ),
        *_matcher("default", "*", "reference"),
    ]


def _converted_to(recipe: str, number_format: str) -> str:
    return (
        f'{{fp8_quantization_recipe: "{recipe}", fp8_format: "{number_format}", '
        "override_nonquantized_autocast: true}"
    )


def _config(name: str, recipe: str) -> list[str]:
    return [
        f"  {name}:",
        '    transformer_engine_config_type: "TEQuantizationParams"',
        f"    training_recipe: {recipe}",
    ]


def _matcher(name: str, pattern: str, config: str) -> list[str]:
    return [
        f"  {name}:",
        f"    config: {config}",
        "    type: glob",
        f"    pattern: {json.dumps(pattern)}",
        "    enabled: true",
    ]


def _globs(plan: Decisions) -> list[str]:
    """Patterns that fit the converted layers and no other: one for a role if it can."""
    roles: dict[str, list[str]] = {}
    for name in plan.converted_fqns:
        roles.setdefault(without_numbers(name), []).append(name)
    left = plan.reference_fqns
    return [x for role, names in roles.items() for x in _globs_of(role, names, left)]


def _globs_of(role: str, names: Sequence[str], left: Sequence[str]) -> list[str]:
    pattern = glob.escape(role).replace("{}", "*")
    if len(names) > 1 and not fnmatch.filter(left, pattern):
        return [pattern]
    return [glob.escape(name) for name in names]
