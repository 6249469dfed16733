"""Which trial plan makes the training step fastest. Pure statistics; imports no torch.

A trial plan converts some roles and not others. In each round every plan of the field
runs one training step, and the order is turned around from round to round, so that drift
falls on all alike. Times are compared within a round. Clearly beaten plans leave at the
looks (8, 16, 32 rounds). What stays is settled so:

* high precision wins unless another plan is clearly faster than it;
* among plans that do not differ clearly from the fastest, and by at most 2%, the one
  that converts the fewest layers wins.

Then a new field is made of the winner and the winner with one role flipped, those first
whose own speedup was nearest to the threshold, until no flip is left or the steps are
spent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.intervals import FIRST_LOOK, Interval, looks, speedup_interval
from fp8tune.trial_records import TrialResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Role", "Tournament", "TrialPlan"]

# At most so many plans at a time; Dynamo's guards are checked one plan after another.
_FIELD_SIZE = 8

# Rounds of a new field that are not counted: the first compiles and autotunes, in the
# second the allocator reaches its new peak.
_UNCOUNTED_ROUNDS = 2

_MOST_ROUNDS = 32

# On a noisy machine plans that are 10% apart may not differ clearly. Fewer converted
# layers are worth this much at most.
_NEAR = 1.02


@dataclass(frozen=True, order=True)
class Role:
    """Layers whose names differ only in the index of a repeated block, alike in calls.

    Attributes:
        name: the common name, such as ``layers.{}.wq``.
        fqns: the layers.
        distance: how far from the threshold its own speedup was, as a ratio >= 1.
    """

    name: str
    fqns: tuple[str, ...]
    distance: float


TrialPlan = frozenset[Role]


@dataclass
class _Field:
    """The plans that run against each other, and their times by round."""

    plans: list[TrialPlan]
    rounds: list[dict[TrialPlan, float]] = field(default_factory=list)
    ran: int = 0

    def times(self, plan: TrialPlan) -> list[float]:
        return [x[plan] for x in self.rounds if plan in x]

    def ratios(self, slow: TrialPlan, fast: TrialPlan) -> list[float]:
        """How many times faster ``fast`` was than ``slow``, round by round."""
        both = [x for x in self.rounds if slow in x and fast in x]
        return [x[slow] / x[fast] for x in both]


class Tournament:
    """Decides which plan runs in which step, and which one wins.

    Args:
        roles: what can be converted.
        start: the per-layer plan.
        confidence: as in TuneConfig, for each comparison of two plans.
        min_speedup: as in TuneConfig, for the whole step.
        max_steps: training steps that may be spent.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        start: TrialPlan,
        *,
        confidence: float,
        min_speedup: float,
        max_steps: int,
    ) -> None:
        self._roles = sorted(roles, key=lambda role: (role.distance, role.name))
        self._confidence = confidence
        self._min_speedup = min_speedup
        self._max_steps = max_steps
        self._fields: list[_Field] = []
        self._tried: set[TrialPlan] = set()
        self.steps = 0
        self.best = self.reference = TrialPlan()
        self.finished = False
        self._enter([self.reference, TrialPlan(roles), start, *self._flips(start)])

    def _flips(self, plan: TrialPlan) -> list[TrialPlan]:
        return [plan ^ {role} for role in self._roles]

    def _enter(self, wanted: Sequence[TrialPlan]) -> None:
        plans = list(dict.fromkeys(wanted))[:_FIELD_SIZE]
        self._fields.append(_Field(plans))
        self._tried.update(plans)

    @property
    def _field(self) -> _Field:
        return self._fields[-1]

    def order(self) -> list[TrialPlan]:
        """The plans of the coming round, one training step each."""
        plans = self._field.plans
        return plans if self._field.ran % 2 == 0 else plans[::-1]

    def record(self, times_ms: Mapping[TrialPlan, float]) -> None:
        """Take the times of a whole round, in milliseconds; may end the tournament."""
        now = self._field
        now.ran += 1
        self.steps += len(times_ms)
        if now.ran > _UNCOUNTED_ROUNDS:
            now.rounds.append(dict(times_ms))
        number = len(now.rounds)
        spent = self.steps + len(now.plans) > self._max_steps
        if number in looks(_MOST_ROUNDS) or spent:
            self._look(ended=spent or number == _MOST_ROUNDS)

    def _look(self, *, ended: bool) -> None:
        now = self._field
        if len(now.rounds) >= FIRST_LOOK:
            self.best = self._winner()
            leader = self._leader()
            now.plans = [x for x in now.plans if not self._beaten(x, leader)]
        rivals = [x for x in now.plans if x not in (self.reference, self.best)]
        if ended or not rivals:
            self._next_field()

    def _beaten(self, plan: TrialPlan, leader: TrialPlan) -> bool:
        """Whether to drop a plan; the yardstick and the best so far always stay."""
        if plan in (self.reference, self.best):
            return False
        return self._interval(plan, leader).low > 1

    def _leader(self) -> TrialPlan:
        return min(self._field.plans, key=lambda x: median(self._field.times(x)))

    def _interval(self, slow: TrialPlan, fast: TrialPlan) -> Interval:
        ratios = self._field.ratios(slow, fast)
        return speedup_interval(ratios, self._confidence, len(looks(_MOST_ROUNDS)))

    def _winner(self) -> TrialPlan:
        reference = self.reference
        faster = [
            x
            for x in self._field.plans
            if x != reference and self._interval(reference, x).low > self._min_speedup
        ]
        if not faster:
            return reference
        fastest = min(faster, key=lambda x: median(self._field.times(x)))
        behind = {x: self._interval(x, fastest) for x in faster}
        equal = [x for x, by in behind.items() if by.low <= 1 and by.middle <= _NEAR]
        return min([fastest, *equal], key=_layers)

    def _next_field(self) -> None:
        flips = [x for x in self._flips(self.best) if x not in self._tried]
        plans = list(dict.fromkeys([self.reference, self.best, *flips]))
        cost = len(plans[:_FIELD_SIZE]) * (_UNCOUNTED_ROUNDS + FIRST_LOOK)
        if flips and self.steps + cost <= self._max_steps:
            self._enter(plans)
        else:
            self.finished = True

    @property
    def lost_ms(self) -> float:
        """What training lost to plans slower than the best, in counted rounds."""
        best = self.best
        rounds = [x for ran_in in self._fields for x in ran_in.rounds if best in x]
        return sum(ms - x[best] for x in rounds for ms in x.values() if ms > x[best])

    def results(self, peaks: Mapping[TrialPlan, int]) -> tuple[TrialResult, ...]:
        """What each plan measured when it last ran, the fastest first."""
        latest = {plan: x for x in self._fields if x.rounds for plan in x.rounds[0]}
        results = [self._result(plan, x, peaks) for plan, x in latest.items()]
        return tuple(sorted(results, key=lambda x: -x.speedup))

    def _result(
        self, plan: TrialPlan, ran_in: _Field, peaks: Mapping[TrialPlan, int]
    ) -> TrialResult:
        ratios = ran_in.ratios(self.reference, plan)
        low, middle, high = speedup_interval(
            ratios, self._confidence, len(looks(_MOST_ROUNDS))
        )
        return TrialResult(
            converted=tuple(sorted(role.name for role in plan)),
            layers=_layers(plan),
            step_ms=median(ran_in.times(plan)),
            speedup=middle,
            speedup_low=low,
            speedup_high=None if high == float("inf") else high,
            rounds=len(ratios),
            peak_bytes=peaks.get(plan),
        )


def _layers(plan: TrialPlan) -> int:
    return sum(len(role.fqns) for role in plan)
