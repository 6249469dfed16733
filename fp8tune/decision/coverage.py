"""How much of a training step's matrix products fp8tune can tune at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["EXPERTS", "Coverage", "merged_coverage"]

# What grouped GEMMs, and other products of 3-D Parameters, are called.
EXPERTS = "experts"


@dataclass(frozen=True)
class Coverage:
    """FLOPs of the matrix products of one forward and its backward.

    Attributes:
        candidates: of the layers that were timed, whatever they ended as.
        rest: (what, FLOPs) of the others, the largest first.
    """

    candidates: int
    rest: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        """Of all."""
        return self.candidates + sum(flops for _, flops in self.rest)

    @classmethod
    def of(cls, candidates: int, rest: Counter[str]) -> Coverage:
        """The record, in its order; what has no FLOPs is left out."""
        known = sorted(rest.items(), key=lambda x: (-x[1], x[0]))
        return cls(candidates, tuple(x for x in known if x[1]))


def merged_coverage(ranks: Iterable[Coverage | None]) -> Coverage | None:
    """Of all ranks together, or None if no rank counted."""
    known = [x for x in ranks if x is not None]
    if not known:
        return None
    rest: Counter[str] = Counter()
    for x in known:
        rest.update(dict(x.rest))
    return Coverage.of(sum(x.candidates for x in known), rest)
