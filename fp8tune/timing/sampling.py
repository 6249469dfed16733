"""Rounds of timings, added until they say enough or a budget is spent."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.decision.intervals import FIRST_LOOK, is_steady, looks, speedup_interval
from fp8tune.decision.judge import interval_of
from fp8tune.decision.load import Load
from fp8tune.timing.gpu_load import gpu_load, read_gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.timing.clock import Clock
    from fp8tune.timing.replay import Replay

__all__ = ["Rounds", "sample_until_clear"]

# Of Linux since 4.20: microseconds in which some process waited for a core.
_PRESSURE = Path("/proc/pressure/cpu")


class Rounds:
    """What was timed so far, and how busy the machine was meanwhile.

    Args:
        clock: what times; one that tells ``shares``, as the CPU's does, is asked for
            them, and of one that has a ``device`` the driver is asked.

    Attributes:
        times: milliseconds of all variants in each half of a round, the reference first.
    """

    def __init__(self, clock: Clock) -> None:
        self.times: list[list[float]] = []
        self._clock = clock
        self._shares: list[list[float]] = []
        self._began = time.monotonic()
        self._pressure_us = _pressure_us()
        self._device = getattr(clock, "device", None)
        self._gpu = read_gpu(self._device) if self._device else None

    def add(self, variants: Sequence[Replay], most: int) -> None:
        """Time a round, of which at most so many halves are kept.

        Forth and back in one round, back and forth in the next: a GPU that was idle runs
        faster at first, so whoever comes first has an advantage.
        """
        first = len(self.times) % 4 == 0
        forth, back = (1, -1) if first else (-1, 1)
        order = [*variants[::forth], *variants[::back]]
        flat = self._clock.time_ms([work for x in order for work in x.works])
        number, routings = len(variants), len(variants[0].works)

        def halves(timed: Sequence[float]) -> list[list[float]]:
            row = _means(timed, routings)
            return [list(row[:number][::forth]), list(row[number:][::back])][:most]

        self.times += halves(flat)
        shares = getattr(self._clock, "shares", None)
        if shares:
            self._shares += halves(shares)

    def load(self, candidate: int) -> Load | None:
        """How busy the machine was, in the pairs of one candidate.

        Args:
            candidate: its place among the variants; the reference's is 0.
        """
        shares = tuple(min(row[0], row[candidate]) for row in self._shares)
        after = read_gpu(self._device) if self._gpu and self._device else None
        gpu = gpu_load(self._gpu, after)
        if not shares and gpu is None:
            return None
        return Load(shares, self._pressure(), gpu)

    def _pressure(self) -> float | None:
        now = _pressure_us()
        seconds = time.monotonic() - self._began
        if now is None or self._pressure_us is None or not seconds:
            return None
        return min((now - self._pressure_us) / 1e6 / seconds, 1.0)

    @property
    def steady(self) -> bool:
        """Whether the thread that timed had a core all the while, so far."""
        if not all(is_steady(column) for column in zip(*self.times, strict=True)):
            return False
        number = len(self._shares[0]) if self._shares else 0
        columns = [[min(x[0], x[i]) for x in self._shares] for i in range(1, number)]
        return all(Load(tuple(column)).steady for column in columns)

    def hopeless(self, config: TuneConfig) -> list[int]:
        """The candidates, by their places, that need no more than these pairs.

        What a candidate waited for is not held against it: where the clock tells shares,
        its CPU time alone is compared with the reference's wall time.
        """
        if not self.times or not (self._shares or self.steady):
            return []
        shares = self._shares or [[1.0] * len(row) for row in self.times]
        rows = list(zip(self.times, shares, strict=True))

        def upper_bound(place: int) -> float:
            busy = [max(times[place] * share[place], 1e-9) for times, share in rows]
            ratios = [times[0] / b for (times, _), b in zip(rows, busy, strict=True)]
            return interval_of(ratios, config).high

        places = range(1, len(self.times[0]))
        return [x for x in places if upper_bound(x) < config.min_speedup]


def _means(timed: Sequence[float], number: int) -> list[float]:
    """The mean of each so many neighbours: of one variant with each of its routings."""
    starts = range(0, len(timed), number)
    return [sum(timed[i : i + number]) / number for i in starts]


def _pressure_us() -> int | None:
    try:
        return int(_PRESSURE.read_text().split("total=")[1].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def sample_until_clear(
    variants: Sequence[Replay], clock: Clock, config: TuneConfig
) -> Rounds:
    """Time all variants, the reference first, in rounds.

    A sample that something else disturbed is never clear: it goes on until the budget
    ends, or until most of it is undisturbed.

    Returns:
        What was timed: a single round, where it shows that a candidate is hopeless.
    """
    rounds = Rounds(clock)
    deadline = clock.now() + config.max_seconds
    rounds.add(variants, FIRST_LOOK)
    if rounds.hopeless(config):
        return rounds
    stops = looks(config.max_samples)
    for number in stops:
        while len(rounds.times) < number:
            started = clock.now()
            rounds.add(variants, number - len(rounds.times))
            ended = clock.now()
            enough = len(rounds.times) >= FIRST_LOOK
            if enough and ended + (ended - started) > deadline:
                return rounds
        if rounds.steady and _is_clear(rounds.times, config, len(stops)):
            return rounds
    return rounds


def _is_clear(
    times: Sequence[Sequence[float]], config: TuneConfig, number_of_looks: int
) -> bool:
    """Whether more rounds would change nothing."""
    columns = list(zip(*times, strict=True))

    def beats(
        slow: Sequence[float], fast: Sequence[float], factor: float
    ) -> bool | None:
        """Whether ``fast`` is clearly that many times faster, or clearly not."""
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        interval = speedup_interval(ratios, config.confidence, number_of_looks)
        if interval.low > factor:
            return True
        return False if interval.high < factor else None

    reference, *candidates = columns
    verdicts = [beats(reference, x, config.min_speedup) for x in candidates]
    if None in verdicts:
        return False
    faster = [x for x, verdict in zip(candidates, verdicts, strict=True) if verdict]
    faster.sort(key=median)
    return all(beats(other, faster[0], 1.0) is not None for other in faster[1:])
