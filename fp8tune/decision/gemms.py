"""The three GEMMs of a Linear, and names for recipes that convert only some of them.

``rowwise:output+grad_input`` is rowwise with the weight's gradient in high precision. Pure;
imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp8tune.decision.records import Signature

__all__ = [
    "CASTS",
    "GEMMS",
    "base_of",
    "gemms_of",
    "is_part",
    "needed_gemms",
    "part_name",
]

# x @ w.T, g @ w and g.T @ x, of input x, weight w and output gradient g.
GEMMS = ("output", "grad_input", "grad_weight")

# The fields of torchao's Float8LinearConfig that cast the two operands of each.
CASTS = {
    "output": ("cast_config_input", "cast_config_weight"),
    "grad_input": ("cast_config_grad_output", "cast_config_weight_for_grad_input"),
    "grad_weight": (
        "cast_config_grad_output_for_grad_weight",
        "cast_config_input_for_grad_weight",
    ),
}

_PART = ":"
_AND = "+"


def part_name(base: str, gemms: Iterable[str]) -> str:
    """The name of a recipe that converts only these GEMMs."""
    wanted = set(gemms)
    return base + _PART + _AND.join(x for x in GEMMS if x in wanted)


def base_of(name: str) -> str:
    """The recipe whose GEMMs are converted; ``name`` itself if all are."""
    return name.rpartition(_PART)[0] if is_part(name) else name


def is_part(name: str) -> bool:
    """Whether a recipe of this name converts only some GEMMs."""
    return bool(gemms_of(name))


def gemms_of(name: str) -> tuple[str, ...]:
    """The GEMMs that the name of a part names; () for a whole recipe."""
    named = name.rpartition(_PART)[2].split(_AND) if _PART in name else []
    return tuple(x for x in GEMMS if x in named) if set(named) <= set(GEMMS) else ()


def needed_gemms(signature: Signature, among: Sequence[str] = GEMMS) -> list[str]:
    """Those of the GEMMs that training computes for a signature."""
    needed = {
        "output": True,
        "grad_input": signature.grad_input,
        "grad_weight": signature.grad_weight,
    }
    return [x for x in among if needed[x]]
