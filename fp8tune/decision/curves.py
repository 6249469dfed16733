"""Speedup over M: exact where it was timed, interpolated between, clamped outside.

Between two timed M the speedup and its bounds follow a straight line over log M, and the
reference's time a straight line in log-log. The true curve bends, so the bounds are
moved apart by a part of the difference of the two speedups, most in the middle. Outside the
nearest timed M counts. A larger M may gain more and a smaller one less, so above the
range the upper bound moves up, and below it the lower bound moves down, by a factor for
each octave. Time there is in proportion to M.

Both figures come from torchao's table for one H100 (ao PR 2312), where twice the M
changes the speedup by 1.12x in the median. With every other M of it held out, no verdict
on a shape that differs by more than 2% turns into its opposite, and 95% of the clear
ones stay (``tests/decision/test_held_out_m.py``).
"""

from __future__ import annotations

import bisect
import math
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.decision.intervals import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.decision.records import Measurement

__all__ = ["Point", "point_at", "time_at"]

# Half-way between two timed M the bounds move apart by a tenth of their difference.
_BEND = 0.4
# What the speedup gains with twice the M, by the median of that table.
_OUTSIDE = 1.12


class Point(NamedTuple):
    """One M of a kind: the reference's time in ms, the speedup and its bounds."""

    m: int
    time_ms: float
    speedup: Interval


def point_at(timed: Sequence[Point], m: int) -> tuple[Point, Sequence[Point]]:
    """The point at any M, and the timed ones that it follows from.

    Args:
        timed: at least one point, in the order of M.
        m: rows of the call.
    """
    i = bisect.bisect_left(timed, m, key=lambda x: x.m)
    if i < len(timed) and timed[i].m == m:
        return timed[i], timed[i : i + 1]
    if 0 < i < len(timed):
        return _between(timed[i - 1], timed[i], m), timed[i - 1 : i + 1]
    nearest = timed[min(i, len(timed) - 1)]
    return _outside(nearest, m), [nearest]


def _between(a: Point, b: Point, m: int) -> Point:
    share = math.log(m / a.m) / math.log(b.m / a.m)
    time_ms = a.time_ms * (b.time_ms / a.time_ms) ** share
    low, middle, high = (
        (1 - share) * x + share * y for x, y in zip(a.speedup, b.speedup, strict=True)
    )
    bend = _BEND * share * (1 - share) * abs(a.speedup.middle - b.speedup.middle)
    return Point(m, time_ms, Interval(max(0.0, low - bend), middle, high + bend))


def _outside(nearest: Point, m: int) -> Point:
    low, middle, high = nearest.speedup
    change = _OUTSIDE ** math.log2(m / nearest.m)
    time_ms = nearest.time_ms * m / nearest.m
    return Point(
        m, time_ms, Interval(low * min(1.0, change), middle, high * max(1.0, change))
    )


def time_at(timed: Sequence[Measurement], m: int) -> float:
    """Reference and candidate together at any M, in ms, as ``point_at`` has the time.

    Args:
        timed: at least one, none failed, in the order of M.
        m: rows of the call.
    """
    points = [
        Point(
            x.signature.shape.m,
            median(x.reference_ms) + median(x.candidate_ms),
            Interval(1.0, 1.0, 1.0),
        )
        for x in timed
    ]
    return point_at(points, m)[0].time_ms
