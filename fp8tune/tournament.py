"""Which trial plan makes the training step fastest. Pure statistics; imports no torch.

A trial plan converts some roles and not others. In each round every plan of the field
runs one training step, in an order in which each follows each of the others equally
often, so that neither drift nor what the step before left in the caches falls on one.
Times are compared within a round, after 8, 16 and 32 rounds that two plans have in
common.

The field is all reference, the *leader*, and challengers of it: the leader with one role
flipped, those first whose own speedup was nearest to the threshold, then with a whole
family on or off, since siblings that share their input's cast may only win together. A
challenger that is clearly beaten leaves, and so does one that is known to be within 1%
of the leader or has run 32 rounds; one that was faster by the median takes the lead.
The next challenger takes the free place, until none is left or the steps are spent.
What stays is settled so:

* high precision wins unless another plan is clearly faster than it;
* among plans that do not differ clearly from the leader, and by at most 1%, the one
  that converts the fewest layers wins.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.intervals import Interval, looks, speedup_interval
from fp8tune.rounds import balanced_order
from fp8tune.trial_records import TrialResult

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["Role", "Tournament", "TrialPlan"]

# At most so many plans at a time; Dynamo's guards are checked one plan after another.
_FIELD_SIZE = 8

# Steps of a new plan that are not counted: the first compiles and autotunes, in the
# second the allocator reaches its new peak.
_UNCOUNTED = 2

_MOST_ROUNDS = 32
_LOOKS = looks(_MOST_ROUNDS)

# On a noisy machine plans that are 10% apart may not differ clearly. Fewer converted
# layers are worth this much at most.
_NEAR = 1.01


@dataclass(frozen=True, order=True)
class Role:
    """Layers whose names differ only in the index of a repeated block, alike in calls.

    Attributes:
        name: the common name, such as ``layers.{}.wq``.
        fqns: the layers.
        distance: how far from the threshold its own speedup was, as a ratio >= 1.
        family: equal for roles that may read the same input.
    """

    name: str
    fqns: tuple[str, ...]
    distance: float
    family: str = ""


TrialPlan = frozenset[Role]


class Tournament:
    """Decides which plan runs in which step, and which one wins.

    Args:
        roles: what can be converted.
        start: the per-layer plan.
        confidence: as in TuneConfig, for each comparison of two plans.
        min_speedup: as in TuneConfig, for the whole step.
        max_steps: training steps that may be spent.

    Attributes:
        steps: training steps so far.
        best: the winner, if it ended now.
        finished: whether it has ended.
    """

    def __init__(
        self,
        roles: Collection[Role],
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
        self._rounds: list[dict[TrialPlan, float]] = []
        self._ran: Counter[TrialPlan] = Counter()
        self.steps = 0
        self.finished = False
        self.best = self._reference = TrialPlan()
        self._leader = start
        first = dict.fromkeys([self._reference, TrialPlan(roles), start])
        self._field = self._filled(list(first))

    def _filled(self, field: list[TrialPlan]) -> list[TrialPlan]:
        """The field, its free places taken by challengers that never ran."""
        fresh = [x for x in self._challengers() if x not in self._ran]
        every = list(dict.fromkeys([*field, *fresh]))
        return every[: max(_FIELD_SIZE, len(field))]

    def _challengers(self) -> Iterator[TrialPlan]:
        for role in self._roles:
            yield self._leader ^ {role}
        for family in dict.fromkeys(x.family for x in self._roles):
            siblings = TrialPlan(x for x in self._roles if x.family == family)
            yield self._leader | siblings
            yield self._leader - siblings

    def order(self) -> list[TrialPlan]:
        """The plans of the coming round, one training step each."""
        order = balanced_order(len(self._field), len(self._rounds))
        return [self._field[i] for i in order]

    def record(self, times_ms: Mapping[TrialPlan, float]) -> None:
        """Take the times of a whole round, in milliseconds; may end the tournament."""
        self.steps += len(times_ms)
        warm = {x: ms for x, ms in times_ms.items() if self._ran[x] >= _UNCOUNTED}
        self._rounds.append(warm)
        self._ran.update(times_ms.keys())
        self._judge()
        self._field = self._filled(self._field)
        spent = self.steps + len(self._field) > self._max_steps
        self.finished = spent or self._is_settled()
        self.best = self._winner()

    def _judge(self) -> None:
        """Hand on the lead to who was faster, and let go of who is done."""
        gains = {x: self._speedup(self._leader, x) for x in self._field if self._due(x)}
        ahead = [x for x, gain in gains.items() if gain.middle > 1]
        self._leader = max(ahead, key=lambda x: gains[x].middle, default=self._leader)
        stay = (self._reference, self._leader)
        self._field = [x for x in self._field if x in stay or not self._is_done(x)]

    def _due(self, plan: TrialPlan) -> bool:
        """Whether to compare it with the leader now."""
        number = len(self._ratios(self._leader, plan))
        return plan != self._leader and (number in _LOOKS or number > _MOST_ROUNDS)

    def _is_done(self, plan: TrialPlan) -> bool:
        """Whether more rounds would not make it the winner, or tell nothing new."""
        if not self._due(plan):
            return False
        behind = self._speedup(plan, self._leader)
        clear = behind.low > 1 or behind.high <= _NEAR
        return clear or len(self._ratios(plan, self._leader)) >= _MOST_ROUNDS

    def _is_settled(self) -> bool:
        """Whether only the leader is left, and how it compares with high precision."""
        if not {self._reference, self._leader}.issuperset(self._field):
            return False
        return self._leader == self._reference or self._is_done(self._reference)

    def _ratios(self, slow: TrialPlan, fast: TrialPlan) -> list[float]:
        """How many times faster ``fast`` was than ``slow``, by round."""
        both = [x for x in self._rounds if slow in x and fast in x]
        return [x[slow] / x[fast] for x in both]

    def _speedup(self, slow: TrialPlan, fast: TrialPlan) -> Interval:
        ratios = self._ratios(slow, fast)
        return speedup_interval(ratios, self._confidence, len(_LOOKS))

    def _winner(self) -> TrialPlan:
        every = {x: self._speedup(self._reference, x) for x in self._timed()}
        faster = {x: by for x, by in every.items() if by.low > self._min_speedup}
        if not faster:
            return self._reference
        fastest = max(faster, key=lambda x: (x == self._leader, faster[x].middle))
        near = [
            x
            for x, by in faster.items()
            if faster[fastest].middle <= _NEAR * by.middle and not self._beaten(x)
        ]
        return min([fastest, *near], key=_layers)

    def _timed(self) -> list[TrialPlan]:
        """The plans that ran beside high precision, itself included."""
        return [x for x in self._ran if self._ratios(self._reference, x)]

    def _beaten(self, plan: TrialPlan) -> bool:
        ratios = self._ratios(plan, self._leader)
        return bool(ratios) and self._speedup(plan, self._leader).low > 1

    @property
    def unclear(self) -> TrialPlan:
        """Roles that the best plan leaves out, though it is not clearly faster for it."""
        rivals = [
            x
            for x in self._timed()
            if self._ratios(x, self.best) and self._speedup(x, self.best).low <= 1
        ]
        return TrialPlan().union(*rivals) - self.best

    @property
    def lost_ms(self) -> float:
        """What training lost to plans slower than the best, in counted steps.

        The best plan did not run in every round, but high precision did.
        """
        if not self._timed():
            return 0.0
        best = self._speedup(self._reference, self.best).middle
        rounds = [x for x in self._rounds if self._reference in x]
        lost = [ms - x[self._reference] / best for x in rounds for ms in x.values()]
        return sum(ms for ms in lost if ms > 0)

    def results(self, peaks: Mapping[TrialPlan, int]) -> tuple[TrialResult, ...]:
        """What each plan measured, the fastest first."""
        results = [self._result(plan, peaks) for plan in self._timed()]
        return tuple(sorted(results, key=lambda x: -x.speedup))

    def _result(self, plan: TrialPlan, peaks: Mapping[TrialPlan, int]) -> TrialResult:
        low, middle, high = self._speedup(self._reference, plan)
        return TrialResult(
            converted=tuple(sorted(role.name for role in plan)),
            layers=_layers(plan),
            step_ms=median(x[plan] for x in self._rounds if plan in x),
            speedup=middle,
            speedup_low=low,
            speedup_high=None if high == float("inf") else high,
            rounds=len(self._ratios(self._reference, plan)),
            peak_bytes=peaks.get(plan),
        )


def _layers(plan: TrialPlan) -> int:
    return sum(len(role.fqns) for role in plan)
