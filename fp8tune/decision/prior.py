"""What a published table, or other shapes, let expect of one that nobody timed. Pure.

A shape lies in a cell of the table's grid over log M, log K, log N. Its expected speedup is
interpolated between the cell's corners, and it lies between their smallest and largest.
With every other M, K and N of torchao's table for one H100 held out, which leaves a cell four
times as wide, 85% of the speedups do, and of 914 verdicts that are called clear two are wrong
by more than 2% (``tests/decision/test_prior.py``).

A shape that was not timed here, with others that were, lies between the smallest and the
largest of their speedups, each wider by 1.2 for an octave of distance. With 4, 8 or 16 shapes
of that table known, under 1% of the verdicts that are called clear are wrong by more than 2%.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp8tune.decision.intervals import Interval
    from fp8tune.decision.records import Signature

__all__ = ["Expected", "Table", "expect_near", "is_whole", "together"]

# The table has two digits, and is of one run.
_ROUNDING = 1.02

# Twice the M changes the speedup of torchao's table by 1.12 in the median.
_PER_OCTAVE = 1.12

# Beside one timed shape nothing bounds from the other side, so the median is not enough.
_PER_OCTAVE_ALONE = 1.2

# Octaves of M, K and N together that a timed shape says something of.
_NEAR = 2.0


class Expected(NamedTuple):
    """A speedup that was not timed, and the bounds that it is expected between."""

    low: float
    middle: float
    high: float

    def verdict(self, threshold: float) -> str:
        """Whether it is clear: "faster", "slower" or "unsure"."""
        if self.low > threshold:
            return "faster"
        return "slower" if self.high < threshold else "unsure"


@dataclass(frozen=True)
class Table:
    """Speedups on a grid.

    Attributes:
        recipe: whose.
        device: where they were timed, in words.
        source: who published them.
        speedups: by (M, K, N), for every combination of the M, K and N that occur.
    """

    recipe: str
    device: str
    source: str
    speedups: Mapping[tuple[int, int, int], float]

    def expect(self, m: int, k: int, n: int) -> Expected:
        """What is expected of forward + backward of one shape."""
        axes = [sorted(set(axis)) for axis in zip(*self.speedups, strict=True)]
        ends = [_between(x, axis) for x, axis in zip((m, k, n), axes, strict=True)]
        corners = [
            (math.prod(share for _, share in corner), self.speedups[_at(corner)])
            for corner in itertools.product(*ends)
        ]
        outside = sum(_octaves(x, a) for x, a in zip((m, k, n), axes, strict=True))
        margin = _ROUNDING * _PER_OCTAVE**outside
        values = [speedup for _, speedup in corners]
        middle = sum(share * speedup for share, speedup in corners)
        return Expected(min(values) / margin, middle, max(values) * margin)


def expect_near(
    shape: tuple[int, int, int], known: Iterable[tuple[tuple[int, int, int], Interval]]
) -> Expected | None:
    """What is expected of a shape beside others, or None if none of them is near.

    Args:
        shape: its M, K and N.
        known: the M, K and N of others with the interval of their speedup.
    """
    apart = [(_apart(shape, other), speedup) for other, speedup in known]
    near = [(octaves, x) for octaves, x in apart if octaves <= _NEAR]
    if not near:
        return None
    low = min(x.low / _PER_OCTAVE_ALONE**octaves for octaves, x in near)
    high = max(x.high * _PER_OCTAVE_ALONE**octaves for octaves, x in near)
    _, nearest = min(near)
    return Expected(low, nearest.middle, high)


def together(each: Sequence[Expected]) -> Expected:
    """What is expected of several calls together; at least one."""
    low, middle, high = zip(*each, strict=True)
    return Expected(min(low), sum(middle) / len(each), max(high))


def is_whole(signature: Signature) -> bool:
    """Whether it is a Linear's forward and both GEMMs of its backward, in bfloat16."""
    shape = signature.shape
    dtype = shape.autocast_dtype or shape.input_dtype
    both = signature.grad_input and signature.grad_weight
    return dtype == "bfloat16" and both and not shape.experts


def _apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    pairs = zip(one, other, strict=True)
    return sum(abs(math.log2(a / b)) for a, b in pairs)


def _at(corner: Sequence[tuple[int, float]]) -> tuple[int, int, int]:
    m, k, n = (x for x, _ in corner)
    return m, k, n


def _between(x: int, axis: Sequence[int]) -> list[tuple[int, float]]:
    """The one or two values of an axis that x lies between, with their shares."""
    x = min(max(x, axis[0]), axis[-1])
    below = max(a for a in axis if a <= x)
    above = min(a for a in axis if a >= x)
    if below == above:
        return [(x, 1.0)]
    share = math.log(x / below) / math.log(above / below)
    return [(below, 1 - share), (above, share)]


def _octaves(x: int, axis: Sequence[int]) -> float:
    """How far outside of the axis x lies."""
    return max(0.0, math.log2(axis[0] / x), math.log2(x / axis[-1]))
