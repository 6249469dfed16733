"""What a training step costs under any plan, learnt from the steps of a few.

The step's time under a plan, as a part of the reference's, is

    1 - what each converted role saves
      - what siblings of one family save by sharing their input's cast, from the second on
      - what pairs of converted roles save together, and the plan alone: small, unknown
      + noise

Per-layer timing is the prior of the first term. So this is a Bayesian linear regression,
and it is computed in its dual form (Rasmussen and Williams, Gaussian Processes for Machine
Learning, sections 2.1 and 2.2): the unknowns are the times of the plans that ran, about
ten, whatever the number of roles and pairs. Closed form, no random numbers, and nothing but
+, -, *, / and square roots, which every machine rounds alike.

Each round has a level of its own (drift), which is estimated and taken off with its own
uncertainty: every plan is compared with all others of its round, the reference above all.
Spikes are weighed down as Student's t with four degrees of freedom would do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.trial.algebra import Matrix, dot, product, solve

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fp8tune.trial.plans import Role

__all__ = ["Estimate", "Mask", "StepModel"]

# A plan as bits, one a role: the i-th role is converted if bit i is set.
Mask = int

# As parts of a step's time. What surrounds a Linear in the step moves its gain by about
# half a percent of a step; the rest was chosen on the simulation of tests/trial.
_CONTEXT = 0.005
# Of the gain itself: what a role saves in the step beside what it saved alone.
_CONTEXT_PART = 0.3
_SHARED, _SHARED_SPREAD = 0.002, 0.008
_PAIR = 0.003
# What all roles are off by alike, each: layers alone pay for launches and casts that the
# whole model fuses, or hides, or the other way round.
_ALIKE = 0.01
_PLAN = 0.0008

# Noise of a step before any was seen, and how many steps that counts for.
_NOISE, _NOISE_STEPS = 0.01, 4
_LEAST_NOISE = 1e-5
_LEAST_SPREAD = 1e-6
_FREEDOM = 4.0
_MAD_TO_SPREAD = 1.4826
_PASSES = 3
_FEW = 4
# Where roles are further off than the prior allows, it is widened, at most so much.
_MOST_WIDENING = 64.0
_CALM = 4


class Estimate(NamedTuple):
    """A difference of two plans' step times, as a part of the reference's."""

    gain: float
    spread: float

    @property
    def most(self) -> float:
        """What it could be at most, at two standard deviations."""
        return self.gain + 2 * self.spread

    @property
    def least(self) -> float:
        """What it could be at least, at two standard deviations."""
        return self.gain - 2 * self.spread


@dataclass(frozen=True)
class _Prior:
    """Mean and covariance of the times of plans, before any step."""

    roles: tuple[tuple[float, float], ...]  # (gain, variance)
    families: tuple[Mask, ...]
    wide: float = 1.0

    def time(self, plan: Mask) -> float:
        gains = sum(x for i, (x, _) in enumerate(self.roles) if plan >> i & 1)
        return 1 - gains - _SHARED * sum(_sharing(plan & x) for x in self.families)

    def covariance(self, a: Mask, b: Mask) -> float:
        both = a & b
        roles = sum(v for i, (_, v) in enumerate(self.roles) if both >> i & 1)
        shared = sum(_sharing(a & x) * _sharing(b & x) for x in self.families)
        known = roles + _SHARED_SPREAD**2 * shared
        known += _ALIKE**2 * a.bit_count() * b.bit_count()
        known += _PAIR**2 * math.comb(both.bit_count(), 2)
        return self.wide * known + (_PLAN**2 if a == b else 0.0)


def _sharing(siblings: Mask) -> int:
    """How many casts siblings save."""
    return max(0, siblings.bit_count() - 1)


class StepModel:
    """The posterior over the step times of all plans.

    Args:
        roles: in a fixed order, that of the bits.
        rounds: milliseconds of each plan that ran and counts; all have the reference, 0.

    Attributes:
        reference_ms: median time of the reference.
        noise: standard deviation of a step's time, spikes apart, as a part of it.
    """

    def __init__(
        self, roles: Sequence[Role], rounds: Sequence[Mapping[Mask, float]]
    ) -> None:
        self._plans = sorted({plan for x in rounds for plan in x if plan})
        self.reference_ms = median(x[0] for x in rounds)
        self._prior = _prior(roles, self.reference_ms)
        self._pull: list[float] = []
        self._known: Matrix = []
        self.noise = _NOISE
        times = self._first_guess(rounds)
        for _ in range(_PASSES if self._plans else 0):
            steps, self.noise = _weighed(rounds, times)
            self._learn(steps, times)
            times = {0: 1.0, **{x: self.time(x) for x in self._plans}}

    def _first_guess(self, rounds: Sequence[Mapping[Mask, float]]) -> dict[Mask, float]:
        """Medians; of plans with few steps what timing expects, for one may be a spike."""
        times = {0: 1.0}
        for plan in self._plans:
            ratios = [x[plan] / x[0] for x in rounds if plan in x]
            few = len(ratios) < _FEW
            times[plan] = self._prior.time(plan) if few else median(ratios)
        return times

    def _learn(
        self, steps: Sequence[Mapping[Mask, _Step]], times: Mapping[Mask, float]
    ) -> None:
        information, target = _information(steps, times, self._plans, self.noise)
        seen = [row[0] for row in solve(information, [[x] for x in target])]
        self._prior = replace(self._prior, wide=1.0)
        self._solve(information, target)
        off = [x - self._prior.time(p) for x, p in zip(seen, self._plans, strict=True)]
        # Its expectation is the number of plans where the prior is right.
        surprise = dot(off, self._pull)
        wide = (surprise + _CALM) / (len(off) + _CALM)
        if wide > 1:
            self._prior = replace(self._prior, wide=min(wide, _MOST_WIDENING))
            self._solve(information, target)

    def _solve(self, information: Matrix, target: Sequence[float]) -> None:
        """Keep what gives means (pull) and covariances (known) of all plans."""
        prior, plans = self._prior, self._plans
        expected = [prior.time(x) for x in plans]
        covariance = [[prior.covariance(a, b) for b in plans] for a in plans]
        spread = product(information, covariance)
        for i, row in enumerate(spread):
            row[i] += 1.0
        off = [t - dot(x, expected) for x, t in zip(information, target, strict=True)]
        right = [[x, *row] for x, row in zip(off, information, strict=True)]
        solved = solve(spread, right)
        self._pull = [row[0] for row in solved]
        self._known = [row[1:] for row in solved]

    def time(self, plan: Mask) -> float:
        """The expected step time, as a part of the reference's."""
        return self._prior.time(plan) + dot(self._links(plan), self._pull)

    def _links(self, plan: Mask) -> list[float]:
        return [self._prior.covariance(plan, x) for x in self._plans]

    def gain(self, slow: Mask, fast: Mask) -> Estimate:
        """What ``fast`` saves over ``slow``."""
        prior = self._prior
        a, b = self._links(slow), self._links(fast)
        between = [x - y for x, y in zip(a, b, strict=True)]
        before = (
            prior.covariance(slow, slow)
            + prior.covariance(fast, fast)
            - 2 * prior.covariance(slow, fast)
        )
        learnt = dot(between, [dot(row, between) for row in self._known])
        gain = prior.time(slow) - prior.time(fast) + dot(between, self._pull)
        return Estimate(gain, math.sqrt(max(_LEAST_SPREAD**2, before - learnt)))


def _prior(roles: Sequence[Role], reference_ms: float) -> _Prior:
    gains = [(x.gain_ms / reference_ms, x.spread_ms / reference_ms) for x in roles]
    families: dict[str, Mask] = {}
    for i, role in enumerate(roles):
        if role.family:
            families[role.family] = families.get(role.family, 0) | 1 << i
    return _Prior(
        tuple(
            (gain, spread**2 + _CONTEXT**2 + (_CONTEXT_PART * gain) ** 2)
            for gain, spread in gains
        ),
        tuple(x for _, x in sorted(families.items()) if x.bit_count() > 1),
    )


class _Step(NamedTuple):
    """One step of one plan beside what was expected of it in its round."""

    ratio: float
    weight: float


def _weighed(
    rounds: Sequence[Mapping[Mask, float]], times: Mapping[Mask, float]
) -> tuple[list[dict[Mask, _Step]], float]:
    """Each step with its weight, and the noise."""
    scaled = [{p: ms / times[p] for p, ms in x.items()} for x in rounds]
    noise = _noise(scaled, len(times))
    levels = [median(x.values()) for x in scaled]
    steps: list[dict[Mask, _Step]] = []
    for _ in range(_PASSES):
        steps = [
            {p: _step(ratio / level, noise) for p, ratio in x.items()}
            for x, level in zip(scaled, levels, strict=True)
        ]
        levels = [
            level * _mean(x.values()) for level, x in zip(levels, steps, strict=True)
        ]
    return steps, noise


def _step(ratio: float, noise: float) -> _Step:
    off = (ratio - 1) / noise
    return _Step(ratio, (_FREEDOM + 1) / (_FREEDOM + off * off))


def _mean(steps: Collection[_Step]) -> float:
    return sum(x.weight * x.ratio for x in steps) / sum(x.weight for x in steps)


def _noise(scaled: Sequence[Mapping[Mask, float]], plans: int) -> float:
    """From the differences within rounds, whose levels cancel out."""
    apart = [
        abs(a - b) / (a + b) * 2 for x in scaled for a, b in combinations(x.values(), 2)
    ]
    steps = sum(map(len, scaled))
    free = steps - len(scaled) - plans + 1
    if free < 1 or not apart:
        return _NOISE
    typical = _MAD_TO_SPREAD * median(apart) / math.sqrt(2)
    seen = typical**2 * (steps - len(scaled)) / free
    variance = (_NOISE_STEPS * _NOISE**2 + free * seen) / (_NOISE_STEPS + free)
    return max(math.sqrt(variance), _LEAST_NOISE)


def _information(
    steps: Sequence[Mapping[Mask, _Step]],
    times: Mapping[Mask, float],
    plans: Sequence[Mask],
    noise: float,
) -> tuple[Matrix, list[float]]:
    """What the steps say of the plans' times, the levels of the rounds taken off.

    Returns:
        (the inverse covariance of the times, its product with the times); the reference
        is not in them, since its time is 1.
    """
    index = {plan: i for i, plan in enumerate(plans)}
    matrix = [[0.0] * len(plans) for _ in plans]
    target = [0.0] * len(plans)
    for step in steps:
        total = sum(x.weight for x in step.values())
        level = sum(x.weight * x.ratio for x in step.values()) / total
        for a, (ratio, weight) in step.items():
            if not a:
                continue
            by = weight / (noise**2 * times[a])
            target[index[a]] += by * (ratio - level)
            for b, (_, other) in step.items():
                share = by * ((a == b) - other / total)
                if b:
                    matrix[index[a]][index[b]] += share / times[b]
                else:
                    target[index[a]] -= share
    return matrix, target
