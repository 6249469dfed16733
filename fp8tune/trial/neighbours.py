"""Which plans are worth a thought: few of the many that there are. Imports no torch."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.trial.model import Mask, StepModel
    from fp8tune.trial.plans import Role

__all__ = ["neighbours"]

# With more roles, pairs of them are too many to look at after each round.
_MOST_PAIRED = 16


def neighbours(model: StepModel, leader: Mask, roles: Sequence[Role]) -> list[Mask]:
    """Plans near the leader and near the plan that the model likes best.

    One or two roles flipped, or a family on or off.
    """
    flips = [1 << i for i in range(len(roles))]
    families: dict[str, Mask] = {}
    for flip, role in zip(flips, roles, strict=True):
        families[role.family] = families.get(role.family, 0) | flip
    paired = flips if len(flips) <= _MOST_PAIRED else []
    changes = [0, *flips, *(a | b for a, b in combinations(paired, 2))]
    every: list[Mask] = []
    for centre in (leader, _favourite(model, leader, flips)):
        every += [centre ^ x for x in changes]
        every += [centre | x for x in families.values()]
        every += [centre & ~x for x in families.values()]
    return list(dict.fromkeys(every))


def _favourite(model: StepModel, start: Mask, flips: Sequence[Mask]) -> Mask:
    """The plan that the model expects to be the fastest, by single flips."""
    best = start
    while True:
        nearest = min((best ^ x for x in flips), key=model.time)
        if model.time(nearest) >= model.time(best):
            return best
        best = nearest
