"""Kinds: signatures that differ only in M, and which M of a kind stand for the others.

M is a number of rows, and in many trainings every step has another one: padded batches,
packed sequences, experts. Timing each would take longer than training, and no later run
would meet the same ones. So at most four M of a kind are timed, where the work is, and
what lies between them is interpolated (see ``fp8tune.decision.curves``).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp8tune.decision.records import Signature

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from fp8tune.decision.records import Layer

__all__ = [
    "MOST_SIZES",
    "MOST_TIMED",
    "Calls",
    "Kind",
    "fits_range",
    "has_many_sizes",
    "is_covered",
    "kind_of",
    "missing_m",
    "reach",
    "representatives",
    "sizes_of",
    "stand_ins",
    "work_of",
]

# M of a kind that are timed: the ends of the range and two between.
MOST_TIMED = 4

# Different M of a kind that are told apart; of more, neighbours are counted together.
MOST_SIZES = 128

# What a range reaches beyond its ends, half an octave: two runs on the same data rarely
# have the same shortest and longest batch.
_MARGIN = math.sqrt(2)

# Two timed M this near, two octaves, need no third between them. It is what four make of
# a range of six octaves, such as 12 to 812 rows.
_NEAR = 4

# GEMMs of tensor cores work on tiles of at least 16 rows, so fewer cost the same.
_TILE = 16

# The smallest calls, with this share of the work, may lie outside what is timed.
_NEGLIGIBLE = 0.01

Calls = tuple[tuple[Signature, int], ...]


@dataclass(frozen=True, order=True)
class Kind:
    """A signature without its M.

    Attributes:
        signature: the signature, with 0 in place of M.
    """

    signature: Signature

    def at(self, m: int) -> Signature:
        """The signature of this kind with that M."""
        return _with_m(self.signature, m)


def kind_of(signature: Signature) -> Kind:
    """The kind that a signature belongs to."""
    return Kind(_with_m(signature, 0))


def _with_m(signature: Signature, m: int) -> Signature:
    return replace(signature, shape=replace(signature.shape, m=m))


def work_of(layers: Sequence[Layer]) -> dict[Kind, dict[int, int]]:
    """The GEMM work of each kind, over all layers that call it.

    Returns:
        For each kind M -> calls * M. K and N are those of the kind, so this is the work
        up to a factor.
    """
    # Many layers share few tuples of calls, which take long to hash.
    alike = Counter(id(layer.calls) for layer in layers)
    rows = {id(layer.calls): layer.calls for layer in layers}
    calls: Counter[Signature] = Counter()
    for key, row in rows.items():
        for signature, count in row:
            calls[signature] += alike[key] * count
    work: dict[Kind, dict[int, int]] = {}
    for signature, count in calls.items():
        m = signature.shape.m
        work.setdefault(kind_of(signature), {})[m] = count * m
    return work


def sizes_of(calls: Iterable[tuple[Signature, int]]) -> dict[Kind, list[int]]:
    """Each kind of these calls, with its M in rising order."""
    sizes: dict[Kind, set[int]] = {}
    for signature, _ in calls:
        sizes.setdefault(kind_of(signature), set()).add(signature.shape.m)
    return {kind: sorted(found) for kind, found in sizes.items()}


def has_many_sizes(calls: Iterable[tuple[Signature, int]]) -> bool:
    """Whether a layer was called with more than one M of a kind."""
    return any(len(sizes) > 1 for sizes in sizes_of(calls).values())


def representatives(work: Mapping[int, float], most: int = MOST_TIMED) -> list[int]:
    """The M to time, in rising order.

    Up to ``most`` M are all timed. Of more, first the two ends: the largest, and the
    smallest apart from a hundredth of the work. Then, one at a time, the M that brings
    most work nearer to a timed M, where near is meant in log M.

    Args:
        work: M -> the work that is done with it.
        most: how many M may be timed.
    """
    sizes = sorted(work)
    if len(sizes) <= most:
        return sizes
    work = _coarse(work)
    chosen = {_low_end(work), sizes[-1]}
    distance = {m: min(_octaves(m, x) for x in chosen) for m in work}
    while len(chosen) < most:
        best = max(work, key=lambda m: (_saved(m, work, distance), m))
        chosen.add(best)
        distance = {m: min(d, _octaves(m, best)) for m, d in distance.items()}
    return sorted(chosen)


def _coarse(work: Mapping[int, float]) -> dict[int, float]:
    instead = stand_ins(sorted(work))
    coarse: dict[int, float] = {}
    for m, amount in work.items():
        coarse[instead[m]] = coarse.get(instead[m], 0) + amount
    return coarse


def stand_ins(sizes: Sequence[int]) -> dict[int, int]:
    """Each M and the M that is counted in its place: itself, up to ``MOST_SIZES``.

    Of more, the largest of those that are nearly equal; both ends stay.

    Args:
        sizes: M in rising order.
    """
    if len(sizes) <= MOST_SIZES:
        return {m: m for m in sizes}
    # The smallest has a cell of its own, and rounding may make one more.
    width = math.log(sizes[-1] / sizes[0]) / (MOST_SIZES - 2)
    cells = [math.ceil(math.log(m / sizes[0]) / width) for m in sizes]
    largest = dict(zip(cells, sizes, strict=True))  # rising, so that the last stays
    return {m: largest[cell] for m, cell in zip(sizes, cells, strict=True)}


def _low_end(work: Mapping[int, float]) -> int:
    below, negligible = 0.0, _NEGLIGIBLE * sum(work.values())
    for m in sorted(work):
        below += work[m]
        if below > negligible:
            return m
    return max(work)


def _saved(m: int, work: Mapping[int, float], distance: Mapping[int, float]) -> float:
    """By how much the work would be nearer to a timed M if this one were timed too."""
    return sum(
        amount * max(0.0, distance[x] - _octaves(x, m)) for x, amount in work.items()
    )


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(a / b))


def missing_m(work: Mapping[int, float], known: Collection[int]) -> list[int]:
    """The representatives of a kind that earlier timings do not stand for.

    A kind with one M needs a timing of that very M.
    """
    wanted = representatives(work)
    if len(work) == 1:
        return [m for m in wanted if m not in known]
    return [m for m in wanted if not is_covered(m, known)]


def is_covered(m: int, known: Collection[int]) -> bool:
    """Whether timings at other M say enough about this one to interpolate.

    They do between two that are at most two octaves apart, or between any two if there
    are as many as would be timed, and up to half an octave outside of two or more.
    """
    if m in known or len(known) < 2:
        return m in known
    timed = sorted(known)
    above = bisect.bisect(timed, m)
    if 0 < above < len(timed):
        near = timed[above] <= _NEAR * timed[above - 1]
        return near or len(timed) >= MOST_TIMED
    return _within(m, timed[0], timed[-1])


def fits_range(m: int, planned: Collection[int]) -> bool:
    """Whether a plan made for calls with these M holds for this one.

    One M is a fixed size: only itself fits. Several are a range, which reaches half an
    octave beyond its ends.
    """
    if m in planned or len(planned) < 2:
        return m in planned
    return _within(m, min(planned), max(planned))


def _within(m: int, low: int, high: int) -> bool:
    return max(low, _TILE) / _MARGIN <= max(m, _TILE) and m <= reach(high)


def reach(high: int) -> float:
    """How far a range that ends with this M holds."""
    return max(high, _TILE) * _MARGIN
