"""Which trial plan makes the training step fastest. Pure statistics; imports no torch.

A trial plan converts some roles and not others. In each round every plan of the field
runs one training step, in an order in which each follows each of the others equally
often, so that neither drift nor what the step before left in the caches falls on one.
All steps teach one model of the step (``fp8tune.trial.model``), which says of every plan,
be it one that never ran, what it is expected to take and how sure that is.

The field is small, since each plan is compiled: all reference, the per-layer plan and all
converted at first, then the leader, which is the plan expected to be the fastest of those
that ran, and whatever plan has the largest chance of beating it by more than 0.25% of a
step. A plan without a chance leaves. The search ends when no plan could beat the leader
by more than 0.35%, at two standard deviations, or when the budget is spent.

The model only chooses what is run. What is promised rests on paired steps and assumes
nothing about the noise: high precision wins unless the winner is clearly faster than it
by ``fp8tune.decision.intervals``. Where the budget ends before anything is clear, the
per-layer plan stays if the model says that it is no slower than high precision, since its
layers were clearly faster alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fp8tune.decision.rounds import balanced_order
from fp8tune.decision.trials import GATHER
from fp8tune.trial.evidence import Evidence
from fp8tune.trial.model import Mask, StepModel
from fp8tune.trial.neighbours import neighbours
from fp8tune.trial.plans import Role, TrialPlan, layers_of
from fp8tune.trial.sizes import Timed

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["Role", "Search", "TrialPlan"]

# Dynamo's guards are checked one plan after another, and each plan is compiled.
_FIELD_SIZE = 4

# Counted rounds before the model is asked, and the plan's own before it may leave.
_FIRST_ROUNDS = 4

# Of 16 rounds each is judged, of 32 every second, of 48 every third.
_SPARSE = 17

# As parts of a step's time: what is worth a plan of its own, and what ends the search.
_WORTH_TRYING = 0.0025
_WORTH_GOING_ON = 0.0035
_EQUAL = 0.0005

# Standard deviations by which a plan must beat the per-layer plan to take its place.
_SURE = 0.5

# So many plans may be compiled before a new one needs more than a faint chance.
_CHEAP_PLANS = 7


class Search:
    """Decides which plan runs in which step, and which one wins.

    Args:
        roles: what can be converted.
        start: the per-layer plan.
        confidence: as in TuneConfig, for each comparison of two plans.
        min_speedup: as in TuneConfig, for the whole step.
        max_steps: training steps that may be spent.
        max_seconds: seconds in forward and backward that may be spent, compiling
            included.

    Attributes:
        roles: as given, in the order of the bits of a mask.
        seen: every step so far, and what it cost.
        model: what the steps so far say of every plan; None before enough were counted.
        best: the winner, if it ended now.
        finished: whether it has ended.
    """

    def __init__(
        self,
        roles: Collection[Role],
        start: TrialPlan,
        *,
        confidence: float = 0.95,
        min_speedup: float = 1.0,
        max_steps: int = 400,
        max_seconds: float = math.inf,
    ) -> None:
        self.roles = sorted(roles)
        self._start = self.mask(start)
        self._min_speedup = min_speedup
        self._max_steps = max_steps
        self._max_seconds = max_seconds
        self.seen = Evidence(confidence, max_steps)
        self.model: StepModel | None = None
        self._leader = self._start
        self._everything = (1 << len(self.roles)) - 1
        self._field = list(dict.fromkeys([0, self._everything, self._start]))
        self.finished = not self.roles
        self._settled = False
        self.best = self._winner()

    def mask(self, plan: Collection[Role]) -> Mask:
        """A plan as a number."""
        return sum(1 << i for i, role in enumerate(self.roles) if role in plan)

    def plan(self, mask: Mask) -> TrialPlan:
        """Undo ``mask``."""
        return TrialPlan(x for i, x in enumerate(self.roles) if mask >> i & 1)

    def order(self) -> list[TrialPlan]:
        """The plans of the coming round, one training step each."""
        order = balanced_order(len(self._field), len(self.seen.log))
        return [self.plan(self._field[i]) for i in order]

    def is_warm(self, plan: TrialPlan) -> bool:
        """Whether the next step of the plan counts."""
        return self.seen.is_warm(self.mask(plan))

    def record(self, times_ms: Mapping[TrialPlan, float | Timed]) -> None:
        """Take the times of a whole round, in milliseconds; may end the search.

        Args:
            times_ms: by plan; ``Timed`` where more than the time is known.
        """
        self._take(
            {
                self.mask(plan): x if isinstance(x, Timed) else Timed(x)
                for plan, x in times_ms.items()
            }
        )

    def _take(self, row: dict[Mask, Timed]) -> None:
        self.seen.add(row)
        spent = (
            self.steps + len(self._field) > self._max_steps
            or self.seen.seconds >= self._max_seconds
        )
        if self._is_due() or (spent and len(self.seen.rounds) >= _FIRST_ROUNDS):
            self.model = StepModel(self.roles, self.seen.rounds)
            self._judge(self.model)
        self.finished = self.finished or spent
        # A budget's end is the last look; a search that has settled had its own.
        self.seen.closed = self.finished and not self._settled
        if self.finished or self._is_due():
            self.best = self._winner()

    @property
    def steps(self) -> int:
        """Training steps so far."""
        return self.seen.steps

    @property
    def leader(self) -> TrialPlan:
        """What is expected to be the fastest of the plans that ran."""
        return self.plan(self._leader)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, as plain lists, numbers and strings."""
        return {
            "roles": [x.name for x in self.roles],
            "rounds": [
                [[plan, *step] for plan, step in row.items()] for row in self.seen.log
            ],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], *, compiled: bool = True
    ) -> bool:
        """Go on from there.

        Args:
            state: what ``state_dict`` returned.
            compiled: plans are compiled anew, so their first steps will not be counted.

        Returns:
            False if it is of other roles, and is not used.
        """
        if state.get("roles") != [x.name for x in self.roles]:
            return False
        for row in state.get("rounds", []):
            self._take({int(plan): Timed(*step) for plan, *step in row})
        if compiled:
            self.seen.forget_compiled()
        return True

    def _is_due(self) -> bool:
        """Whether to ask the model now: less often, the less a round can change."""
        number = len(self.seen.rounds)
        return number >= _FIRST_ROUNDS and number % (1 + number // _SPARSE) == 0

    def _judge(self, model: StepModel) -> None:
        """Hand on the lead, let go of who has no chance, take in who has the largest."""
        known = [
            x
            for x in self.seen.counted()
            if self.seen.number(x) >= _FIRST_ROUNDS and not self.seen.is_vetoed(x)
        ]
        self._leader = self._fastest(model, known)
        self._field = [x for x in self._field if self._stays(model, x)]
        if self._leader not in self._field:
            self._field.append(self._leader)
        places = max(0, _FIELD_SIZE - len(self._field))
        if self.seen.seconds + self.seen.compile_s > self._max_seconds:
            places = 0
        self._field += self._chances(model)[:places]
        rivals = set(self._field) - {0, self._leader}
        self.finished = self._settled = not rivals and self._is_known(model)

    def _fastest(self, model: StepModel, plans: Collection[Mask]) -> Mask:
        """A conversion costs accuracy and has to earn it: of equals, the fewest layers."""
        least = min(map(model.time, plans))
        near = [x for x in plans if model.time(x) <= least + _EQUAL]
        return min(near, key=lambda x: (self._layers(x), model.time(x)))

    def _stays(self, model: StepModel, plan: Mask) -> bool:
        if plan in (0, self._leader) or self.seen.number(plan) < _FIRST_ROUNDS:
            return True
        return model.gain(self._leader, plan).most > _WORTH_GOING_ON

    def _chances(self, model: StepModel) -> list[Mask]:
        """Plans outside of the field that may beat the leader, the likeliest first."""
        found: list[tuple[float, int, Mask]] = []
        near = neighbours(model, self._leader, self.roles)
        for plan in dict.fromkeys([*near, *self.seen.tried]):
            if plan not in self._field:
                gain = model.gain(self._leader, plan)
                hope = gain.gain + self._hope(plan) * gain.spread
                if hope > _WORTH_GOING_ON and not self.seen.is_vetoed(plan):
                    sure = (gain.gain - _WORTH_TRYING) / gain.spread
                    found.append((-sure, self._layers(plan), plan))
        return [plan for *_, plan in sorted(found)]

    def _hope(self, plan: Mask) -> float:
        """Standard deviations that a plan is given; fewer where many were compiled."""
        compiled = len(self.seen.tried)
        return (
            2.0
            if self.seen.is_compiled(plan)
            else 2.0 * min(1.0, _CHEAP_PLANS / compiled)
        )

    def _is_known(self, model: StepModel) -> bool:
        """Whether more rounds would not change how the leader compares with reference."""
        if self._leader == 0 or model.gain(0, self._leader).most <= _WORTH_GOING_ON:
            return True
        by = self.seen.speedup(0, self._leader)
        return by.low > self._min_speedup or by.high <= self._min_speedup

    def _layers(self, plan: Mask) -> int:
        gathers = any(role.name == GATHER for role in self.plan(plan))
        return layers_of(self.plan(plan)) + gathers

    def _winner(self) -> TrialPlan:
        model = self.model
        if model is None:
            return self.plan(self._start if self._seems_good() else 0)
        clear = [
            x
            for x in self.seen.counted()
            if x and self.seen.speedup(0, x).low > self._min_speedup
            if not self.seen.is_vetoed(x)
        ]
        if clear:
            best = self._fastest(model, clear)
            return self.plan(self._start if self._holds(model, best, clear) else best)
        gain = model.gain(0, self._start)
        as_good = gain.gain - gain.spread >= 1 - 1 / self._min_speedup
        stays = as_good and not self._settled and not self.seen.is_vetoed(self._start)
        return self.plan(self._start if stays else 0)

    def _holds(self, model: StepModel, best: Mask, clear: Collection[Mask]) -> bool:
        """Whether the per-layer plan is clear too, and what beats it may be noise."""
        by = model.gain(self._start, best)
        return self._start in clear and by.gain < _SURE * by.spread

    def _seems_good(self) -> bool:
        """Whether the per-layer plan gains, before any round was counted."""
        return sum(x.gain_ms for x in self.plan(self._start)) >= 0
