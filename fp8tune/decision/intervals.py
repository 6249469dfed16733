"""A confidence interval for a speedup that assumes nothing about the noise.

Timings on a busy machine are skewed, heavy-tailed and drift. The reference and the
candidate are therefore timed in pairs, one right after the other, and what is judged is
the median of the pairs' ratios. Each ratio lies below the true median with probability
1/2, whatever the noise looks like, so the number of ratios below it is Binomial(n, 1/2)
and two order statistics bound it (the sign test's interval; Conover, Practical
Nonparametric Statistics, section 3.2). No random numbers are drawn, so the same samples
always give the same interval.

Samples are judged while they are collected, at FIRST_LOOK, 2x, 4x, ... pairs. Looking
several times gives noise several chances to look like a result, so the error that
``1 - confidence`` allows is divided by the number of looks (Bonferroni).
"""

import math
from collections.abc import Sequence
from functools import cache
from statistics import median
from typing import NamedTuple

from fp8tune.config import FIRST_LOOK

__all__ = ["Interval", "is_steady", "looks", "speedup_interval"]

# Far above the jitter of a free machine, and below what a lost time slice costs.
_STEADY = 2.0


class Interval(NamedTuple):
    """A speedup (reference time / candidate time) and the bounds of its interval."""

    low: float
    middle: float
    high: float


def looks(max_samples: int) -> list[int]:
    """Numbers of pairs at which the samples are judged: 8, 16, ... max_samples.

    Raises:
        ValueError: ``max_samples`` is below FIRST_LOOK.
    """
    if max_samples < FIRST_LOOK:
        raise ValueError(f"max_samples is {max_samples}; it must be >= {FIRST_LOOK}")
    doublings = [FIRST_LOOK << i for i in range(max_samples.bit_length())]
    return [n for n in doublings if n < max_samples] + [max_samples]


def speedup_interval(
    ratios: Sequence[float], confidence: float, number_of_looks: int = 1
) -> Interval:
    """The median of paired ratios and its distribution-free interval.

    Args:
        ratios: reference time / candidate time of each pair; at least one.
        confidence: probability that the interval holds the true median at every look.
        number_of_looks: how often growing samples are judged (see ``looks``).

    Returns:
        The interval. With too few pairs to bound the median at all it is
        ``(0, median, inf)``, which excludes nothing.

    Raises:
        ValueError: there are no ratios.
    """
    if not ratios:
        raise ValueError("no ratios; an interval needs at least one pair of timings")
    ordered = sorted(ratios)
    rank = _rank(len(ordered), (1 - confidence) / number_of_looks)
    if rank == 0:
        return Interval(0.0, median(ordered), math.inf)
    return Interval(ordered[rank - 1], median(ordered), ordered[-rank])


def is_steady(times_ms: Sequence[float]) -> bool:
    """Whether the machine was free while these times of one variant were taken.

    On a free machine the median lies near the minimum; a competing process makes it
    several times as large.
    """
    return median(times_ms) <= _STEADY * min(times_ms)


@cache
def _rank(n: int, error: float) -> int:
    """The largest r for which [r-th smallest, r-th largest] errs at most ``error``.

    The interval misses the median if fewer than r of n fair coins show heads, or fewer
    than r show tails: ``2 * P(Binomial(n, 1/2) <= r - 1)``.
    """
    rank, tail = 0, 0.0
    while rank < n // 2:
        tail += 2 * math.comb(n, rank) / 2**n
        if tail > error:
            break
        rank += 1
    return rank
