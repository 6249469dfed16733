"""What the steps of a trial showed, and what of it is certain. Imports no torch."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.decision.intervals import FIRST_LOOK, Interval, looks, speedup_interval
from fp8tune.trial.sizes import Timed, of_one_size, whole_steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8tune.trial.model import Mask

__all__ = ["Evidence"]

# Steps of a new plan that are not counted: the first compiles and autotunes, in the
# second the allocator reaches its new peak.
_UNCOUNTED = 2

# A device's gain that the loop does not show is said from this part of a step on.
_WORTH_SAYING = 0.01


class Evidence:
    """Every step of a trial, in rounds.

    Args:
        confidence: as in TuneConfig, for each comparison of two plans.
        max_steps: training steps that may be spent; how often may be looked follows.

    Attributes:
        rounds: milliseconds of the steps that count, as if all were of one size; all
            rounds have the reference, 0.
        log: all steps, as they came.
        tried: the plans that ran, in order.
        steps: training steps so far.
        seconds: seconds in forward and backward so far, compiling included.
        closed: no more steps will come, so that all of them are looked at.
    """

    def __init__(self, confidence: float, max_steps: int) -> None:
        self.rounds: list[dict[Mask, float]] = []
        self.log: list[dict[Mask, Timed]] = []
        self.tried: dict[Mask, None] = {}
        self.steps = 0
        self.seconds = 0.0
        self.closed = False
        self._confidence = confidence
        self._looks = looks(max(FIRST_LOOK, max_steps // 2))
        self._timed: list[dict[Mask, Timed]] = []
        self._counts: list[frozenset[Mask]] = []  # of the rows of the log
        self._compiling: list[float] = []
        self._ran: Counter[Mask] = Counter()

    def add(self, row: dict[Mask, Timed]) -> None:
        """Take one round."""
        warm = {x: step for x, step in row.items() if self.is_warm(x)}
        if 0 in warm:
            self._timed.append(warm)
            self.rounds = of_one_size(self._timed)
        self._note_cost(row)
        self.log.append(row)
        self._counts.append(frozenset(warm if 0 in warm else ()))

    def in_order(self) -> list[tuple[Mask, float, bool]]:
        """(plan, milliseconds, whether it counts) of all steps, as they came."""
        rows = zip(self.log, self._counts, strict=True)
        return [
            (x, step.ms, x in counts) for row, counts in rows for x, step in row.items()
        ]

    def forget_compiled(self) -> None:
        """Plans are compiled anew, so their first steps will not be counted."""
        self._ran.clear()

    def is_warm(self, plan: Mask) -> bool:
        """Whether its next step counts: its first ones, which compile, lie behind it."""
        return self._ran[plan] >= _UNCOUNTED

    def is_compiled(self, plan: Mask) -> bool:
        """Whether it ran since plans were compiled."""
        return plan in self._ran

    def _note_cost(self, row: Mapping[Mask, Timed]) -> None:
        self.steps += len(row)
        self.seconds += sum(x.busy_s for x in row.values())
        for plan, step in row.items():
            if not self._ran[plan]:
                self._compiling.append(max(0.0, step.busy_s - step.ms / 1e3))
        self._ran.update(row.keys())
        self.tried.update(dict.fromkeys(row))

    @property
    def compile_s(self) -> float:
        """Seconds that compiling one plan takes: what first steps took beyond the device."""
        return median(self._compiling) if self._compiling else 0.0

    def counted(self) -> list[Mask]:
        """The plans that ran beside high precision, itself included."""
        return list(dict.fromkeys(plan for x in self.rounds for plan in x))

    def number(self, plan: Mask) -> int:
        """Counted rounds."""
        return sum(plan in x for x in self.rounds)

    def ratios(self, slow: Mask, fast: Mask) -> list[float]:
        """How many times faster ``fast`` was than ``slow``, by round."""
        both = [x for x in self.rounds if slow in x and fast in x]
        return [x[slow] / x[fast] for x in both]

    def speedup(self, slow: Mask, fast: Mask) -> Interval:
        """The paired interval; growing samples are looked at only at a few sizes."""
        ratios = self.ratios(slow, fast)
        if not self.closed:
            look = max((x for x in self._looks if x <= len(ratios)), default=0)
            ratios = ratios[:look] or ratios
        return speedup_interval(ratios, self._confidence, len(self._looks))

    def _loop_speedup(self, plan: Mask) -> Interval | None:
        """Against all reference, start to start of the next step."""
        both = [x for x in map(whole_steps, self._timed) if plan in x and 0 in x]
        if len(both) < FIRST_LOOK:
            return None
        loops = of_one_size([{p: x[p] for p in (0, plan)} for x in both])
        ratios = [x[0] / x[plan] for x in loops]
        return speedup_interval(ratios, self._confidence, len(self._looks))

    def is_vetoed(self, plan: Mask) -> bool:
        """Whether the loop is clearly slower with it than with all reference."""
        by = self._loop_speedup(plan) if plan else None
        return by is not None and by.high < 1

    @property
    def bound_elsewhere(self) -> bool:
        """Whether what the device saves does not shorten the loop as it should."""
        return any(self._is_lost(x) for x in self.counted() if x)

    def _is_lost(self, plan: Mask) -> bool:
        loops, span = self._loop_speedup(plan), self.speedup(0, plan)
        if loops is None or span.low <= 1 + _WORTH_SAYING:
            return False
        rows = [x for x in self._timed if plan in x]
        device = median(x[0].ms for x in rows)
        loop = median(y[0].ms for x in rows if 0 in (y := whole_steps(x)))
        saved = device * (1 - 1 / span.low)
        return loops.high < loop / (loop - saved) if saved < loop else False
