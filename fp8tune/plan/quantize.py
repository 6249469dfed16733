"""Grouped GEMMs of experts, and mxfp8, in the words of torchao's quantize_.

torchao swaps the data of a Parameter for a tensor that runs ``linear`` and the grouped GEMM
in another way, by a prototype of its own for training. Its filters of modules would swap
each Parameter below a module, so Parameters are named one by one, with ``FqnToConfig``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fp8tune.decision.records import Verdict
from fp8tune.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.records import Decision

__all__ = ["MX_RECIPES", "converted_experts", "quantize_lines"]

MX_RECIPES = ("mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_hp")

_IMPORT_OF = "from torchao.prototype.moe_training.config import"


def converted_experts(plan: Decisions) -> list[str]:
    """The names of the Parameters whose grouped GEMMs the plan converts."""
    return [x.fqn for x in _converted(plan) if x.experts]


def quantize_lines(plan: Decisions, recipe: str) -> list[str]:
    """A program that swaps what the plan converts.

    Args:
        plan: what it converts of Linears counts with an mxfp8 recipe only.
        recipe: "rowwise" or one of mxfp8.

    Raises:
        ExportError: torchao would compute something else for one of them.
    """
    in_mx = recipe in MX_RECIPES
    chosen = [x for x in _converted(plan) if in_mx or x.experts]
    for decision in chosen:
        _refuse_other(decision)
    return [
        *(_mx_config(recipe) if in_mx else _rowwise_config()),
        "QUANTIZED_FQNS = [",
        *(f"    {json.dumps(_parameter(x))}," for x in chosen),
        "]",
        "configs = dict.fromkeys(QUANTIZED_FQNS, config)",
        "quantize_(model, FqnToConfig(configs), filter_fn=None)",
    ]


def _converted(plan: Decisions) -> Iterable[Decision]:
    return [x for x in plan.decisions if x.verdict is Verdict.CONVERTED]


def _parameter(decision: Decision) -> str:
    parts = [decision.fqn] if decision.experts else [decision.fqn, "weight"]
    return ".".join(x for x in parts if x)


def _refuse_other(decision: Decision) -> None:
    shapes = [signature.shape for signature, _ in decision.signatures]
    why = None
    if not decision.experts and any(x.bias for x in shapes):
        why = "a Linear with a bias, which torchao's mxfp8 tensors leave out"
    if any(x.transposed for x in shapes):
        why = "experts whose matrices lie as (E, K, N), which torchao does not lay anew"
    if why:
        raise ExportError(
            f"the plan converts {decision.fqn!r}, {why}; use plan.apply(model), or tune "
            "with filter_fqns that leaves it out"
        )


def _rowwise_config() -> list[str]:
    return [
        f"{_IMPORT_OF} Float8TrainingOpConfig",
        "from torchao.quantization import FqnToConfig, quantize_",
        "",
        "# torchao does not pad here: the rows of each expert must be multiples of 16",
        "config = Float8TrainingOpConfig()",
    ]


def _mx_config(recipe: str) -> list[str]:
    mode = "floor" if recipe == "mxfp8_floor" else "rceil"
    grad_weight_hp = recipe.endswith("wgrad_hp")
    return [
        f"{_IMPORT_OF} MXFP8TrainingOpConfig",
        "from torchao.prototype.mx_formats.config import ScaleCalculationMode",
        "from torchao.quantization import FqnToConfig, quantize_",
        "",
        "# torchao pads the rows of experts; those of Linears must be multiples of 32",
        "config = MXFP8TrainingOpConfig(",
        f'    scale_calculation_mode=ScaleCalculationMode("{mode}"),',
        f"    wgrad_with_hp={grad_weight_hp},",
        "    pad_token_groups_for_grouped_mm=True,",
        ")",
    ]
