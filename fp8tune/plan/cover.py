"""The fewest sets that together hold everything; pure, knows nothing of layers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["smallest_cover"]

# Choices that the exact search may look at. Names of real models need a few dozen; past
# the limit, which keeps made-up ones from taking minutes, the greedy answer is given.
_BUDGET = 20_000


def smallest_cover(sets: Mapping[str, frozenset[int]]) -> list[str]:
    """Names of as few sets as possible whose union is the union of all.

    Args:
        sets: named sets; where two serve equally well the shorter name is taken.
    """
    distinct = _without_subsets(sets)
    groups = _alike(distinct)
    everything = frozenset(range(len(groups)))
    merged = {
        name: frozenset(i for i, group in enumerate(groups) if group <= members)
        for name, members in distinct.items()
    }
    best = _greedy(merged, everything)
    budget = _Budget(_BUDGET)
    for size in range(len(best)):
        found = _search(merged, everything, size, budget)
        if found is not None:
            return found
    return best


def _without_subsets(
    sets: Mapping[str, frozenset[int]],
) -> dict[str, frozenset[int]]:
    ordered = sorted(sets, key=lambda name: (-len(sets[name]), len(name), name))
    kept: dict[str, frozenset[int]] = {}
    for name in ordered:
        if not any(sets[name] <= larger for larger in kept.values()):
            kept[name] = sets[name]
    return kept


def _alike(sets: Mapping[str, frozenset[int]]) -> list[frozenset[int]]:
    """Numbers that are in the same sets, as one group: identical blocks of a model."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, members in sets.items():
        for number in members:
            holders[number].append(name)
    groups: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, names in holders.items():
        groups[tuple(names)].add(number)
    return [frozenset(group) for group in groups.values()]


def _greedy(sets: Mapping[str, frozenset[int]], left: frozenset[int]) -> list[str]:
    chosen: list[str] = []
    while left:
        name = max(sets, key=lambda x: len(sets[x] & left))
        chosen.append(name)
        left -= sets[name]
    return chosen


class _Budget:
    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _search(
    sets: Mapping[str, frozenset[int]], left: frozenset[int], size: int, budget: _Budget
) -> list[str] | None:
    """Exactly ``size`` sets or fewer that hold what is left, or None."""
    if not left:
        return []
    largest = max(len(left & members) for members in sets.values())
    if len(left) > size * largest or not budget.spend():
        return None
    # One of the sets that hold this number is needed; the fewer they are, the better.
    hardest = min(left, key=lambda x: sum(x in members for members in sets.values()))
    for name, members in sets.items():
        if hardest in members:
            rest = _search(sets, left - members, size - 1, budget)
            if rest is not None:
                return [name, *rest]
    return None
