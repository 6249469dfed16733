"""Roles, and the plans that convert some of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp8tune.decision.trials import GATHER

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Role", "TrialPlan", "gather_role", "layers_of"]


@dataclass(frozen=True, order=True, kw_only=True)
class Role:
    """Layers whose names differ only in the index of a repeated block, alike in calls.

    Attributes:
        name: the common name, such as ``layers.{}.wq``.
        fqns: the layers.
        family: equal for roles that may read the same input; "" if none does.
        gain_ms: what per-layer timing says that converting all of them saves, in
            milliseconds a training step; below 0 where it costs.
        spread_ms: standard deviation of that, from the interval of the timing.
    """

    name: str
    fqns: tuple[str, ...]
    family: str = ""
    gain_ms: float = 0.0
    spread_ms: float = 0.0


TrialPlan = frozenset[Role]


def layers_of(plan: TrialPlan) -> int:
    """How many layers it converts."""
    return sum(len(role.fqns) for role in plan if role.name != GATHER)


def gather_role(roles: Iterable[Role]) -> Role:
    """Float8 all-gather, of which nothing is known before whole steps were timed.

    Args:
        roles: the layers'; a tenth and more of their time is what it may save or cost.
    """
    spread_ms = sum(x.spread_ms for x in roles)
    return Role(name=GATHER, fqns=(GATHER,), spread_ms=spread_ms)
