"""Steps of different size made comparable. Pure; imports no torch."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Timed", "of_one_size", "whole_steps"]

# Slopes further from the others than this times their typical distance are spikes.
_FAR = 3.0
_PASSES = 3


class Timed(NamedTuple):
    """One training step of one plan.

    Attributes:
        ms: first forward to end of backward, on the device.
        size: elements of the inputs of all its forwards; 0 where there are none.
        wall_ms: start to start of the next step, on the CPU's clock; 0 where that is not
            known.
        busy_s: wall seconds inside of forward and backward, compiling included.
        device_ms: start to start of the next step, on the device's own timeline; 0 where
            that is not known.
    """

    ms: float
    size: float = 0.0
    wall_ms: float = 0.0
    busy_s: float = 0.0
    device_ms: float = 0.0


def whole_steps(row: Mapping[int, Timed]) -> dict[int, Timed]:
    """A round whose times are start to start, without the plans of which it is not known.

    On the device's own timeline where all know it: on the CPU's clock a step that the CPU
    launches ahead of the device ends too early.
    """
    whole = {p: x._replace(ms=x.device_ms) for p, x in row.items() if x.device_ms}
    if 0 in whole:
        return whole
    return {p: x._replace(ms=x.wall_ms) for p, x in row.items() if x.wall_ms}


def of_one_size(rounds: Sequence[Mapping[int, Timed]]) -> list[dict[int, float]]:
    """Milliseconds of each step as if all had the mean size.

    A step takes a fixed part and one in proportion to its size; the parts are fitted to
    all steps, each beside the others of its plan.
    """
    sizes = [x.size for row in rounds for x in row.values()]
    mean = sum(sizes) / len(sizes) if sizes else 0.0
    if mean <= 0 or min(sizes) in (0, max(sizes)):
        return [{plan: x.ms for plan, x in row.items()} for row in rounds]
    part = _part_of_size(rounds, mean)
    return [
        {plan: x.ms / (1 + part * (x.size / mean - 1)) for plan, x in row.items()}
        for row in rounds
    ]


def _part_of_size(rounds: Sequence[Mapping[int, Timed]], mean: float) -> float:
    """Which part of a step of mean size grows with the size, between 0 and 1."""
    part = 1.0
    for _ in range(_PASSES):
        points: list[tuple[float, float]] = []
        for plan in dict.fromkeys(plan for row in rounds for plan in row):
            steps = [row[plan] for row in rounds if plan in row]
            typical = median(x.ms / (1 + part * (x.size / mean - 1)) for x in steps)
            points += [(x.size / mean - 1, x.ms / typical - 1) for x in steps]
        part = min(1.0, max(0.0, _slope(points, part)))
    return part


def _slope(points: Sequence[tuple[float, float]], before: float) -> float:
    """Least squares through the origin, without what lies far from the line before."""
    off = [abs(y - before * x) for x, y in points]
    far = _FAR * 1.4826 * median(off)
    near = [p for p, distance in zip(points, off, strict=True) if distance <= far]
    squares = sum(x * x for x, _ in near)
    return sum(x * y for x, y in near) / squares if squares else before
