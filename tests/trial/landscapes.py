"""Training steps whose true times are known: 5 to 10 roles, and what no timing shows."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from fp8tune.trial.search import Role, Search, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

STEP_MS = 100.0


@dataclass
class Landscape:
    """True step times of every plan, in ms; all reference takes 100.

    Attributes:
        roles: with the gains that per-layer timing predicts.
        start: the roles that are predicted to gain.
    """

    roles: list[Role]
    start: TrialPlan
    gains: dict[str, float]
    shared: dict[str, float]
    pairs: dict[frozenset[str], float]
    cliff: tuple[str, str] | None
    known: dict[TrialPlan, float] = field(default_factory=dict)

    def time(self, plan: TrialPlan) -> float:
        if plan not in self.known:
            self.known[plan] = self._time(plan)
        return self.known[plan]

    def _time(self, plan: TrialPlan) -> float:
        names = {role.name for role in plan}
        saved = sum(self.gains[x] for x in names)
        for family, each in self.shared.items():
            saved += each * max(0, sum(x.family == family for x in plan) - 1)
        saved += sum(x for pair, x in self.pairs.items() if pair <= names)
        if self.cliff and self.cliff[0] in names and self.cliff[1] not in names:
            saved -= 2.0
        return STEP_MS - saved

    def best(self) -> float:
        return min(map(self.time, every_plan(self.roles)))


def every_plan(roles: list[Role]) -> Iterable[TrialPlan]:
    for bits in range(1 << len(roles)):
        yield TrialPlan(x for i, x in enumerate(roles) if bits >> i & 1)


def landscape(seed: int, *, cliff: bool | None = None, error: float = 1.0) -> Landscape:
    """A random one; every second has a cliff.

    Args:
        seed: which.
        cliff: whether it has one, if said.
        error: how far per-layer timing is off; 1 is half a percent of a step and a fifth
            of the gain.
    """
    random_ = random.Random(seed)  # noqa: S311 - landscapes, not secrets
    names = [f"w{i}" for i in range(random_.randint(5, 10))]
    gains = {x: random_.uniform(-2.0, 4.0) for x in names}
    family = {x: f"family {random_.randint(0, len(names) // 2)}" for x in names}
    shared = {x: abs(random_.gauss(0, 0.5)) for x in sorted(set(family.values()))}
    every = [frozenset(x) for x in combinations(names, 2)]
    pairs = {x: random_.gauss(0, 0.3) for x in random_.sample(every, len(names) // 2)}
    predicted = {
        x: g + random_.gauss(0, error * (0.5 + 0.2 * abs(g))) for x, g in gains.items()
    }
    roles = [
        Role(
            name=x,
            fqns=tuple(f"{i}.{x}" for i in range(4)),
            family=family[x],
            gain_ms=predicted[x],
        )
        for x in names
    ]
    has_cliff = seed % 2 == 0 if cliff is None else cliff
    a, b = random_.sample(names, 2)
    return Landscape(
        roles,
        TrialPlan(x for x in roles if x.gain_ms > 0.2),
        gains,
        shared,
        pairs,
        (a, b) if has_cliff else None,
    )


def fused_block(error: float) -> Landscape:
    """A small block whose layers all lose alone, and of which four of five gain together.

    All converted takes 1.437 ms, all but wo 1.338 ms, nothing converted 1.430 ms:
    torchtitan's debug model at M = 8, compiled, recipe bf16, on an AMD EPYC.

    Args:
        error: what each loses more alone than in the model, in percent of a step.
    """
    gains = {"wqkv": 1.4, "wo": -6.9, "w1": 1.5, "w2": 1.5, "w3": 1.5}
    families = {"wqkv": "attention", "wo": "attention", "w1": "input", "w3": "input"}
    roles = [
        Role(name=x, fqns=(x,), family=families.get(x, "hidden"), gain_ms=gain - error)
        for x, gain in gains.items()
    ]
    return Landscape(roles, TrialPlan(), gains, {"input": 0.5}, {}, None)


@dataclass(frozen=True)
class Ended:
    """How a search ended; regret and the rest as parts of a step."""

    regret: float
    over_start: float
    over_reference: float
    steps: int
    plans: int


def run(world: Landscape, noise: float, seed: int, max_steps: int = 400) -> Ended:
    """A whole search in noisy steps, with spikes, slow drift and compilation."""
    random_ = random.Random(f"{seed} {noise}")  # noqa: S311
    search = Search(
        world.roles, world.start, confidence=0.95, min_speedup=1.0, max_steps=max_steps
    )
    ran: dict[TrialPlan, int] = {}
    step, wander = 0, 0.0
    while not search.finished:
        times: dict[TrialPlan, float] = {}
        for plan in search.order():
            wander += random_.gauss(0, 0.001)
            drift = 1 + 0.05 * math.sin(step / 60) + wander
            ms = world.time(plan) * drift * max(0.2, random_.gauss(1, noise))
            if random_.random() < 0.02:
                ms *= random_.uniform(1.2, 4)
            if ran.get(plan, 0) < 1:
                ms *= 50
            ran[plan] = ran.get(plan, 0) + 1
            step += 1
            times[plan] = ms
        search.record(times)
    found = world.time(search.best)
    return Ended(
        found / world.best() - 1,
        found / world.time(world.start) - 1,
        found / world.time(TrialPlan()) - 1,
        step,
        len(ran),
    )
