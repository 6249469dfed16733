"""Whole plans of one block, timed against each other.

One model is switched in place from plan to plan. A model for each plan would find its
weights in no cache, which in training they sometimes are, and would not fit for large
blocks. All plans run once a round, in an order in which each follows each of the others
equally often, and are compared within a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8tune.bench.blocks import Model
from fp8tune.compiling.inductor import with_recipe_settings
from fp8tune.decision.intervals import FIRST_LOOK
from fp8tune.decision.rounds import balanced_order
from fp8tune.model.linears import named_gemms
from fp8tune.timing.memory import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.bench.sizes import Workload
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock

__all__ = ["COMPILE", "PlanNames", "Race", "model_of"]

COMPILE: dict[str, Any] = {"fullgraph": True, "dynamic": False}

# The Linears and grouped GEMMs that a plan converts.
PlanNames = frozenset[str]

_MOST_ROUNDS = 64


def model_of(workload: Workload, recipe: Recipe, device: torch.device) -> Model:
    """The workload's model in the dtype that the recipe is compared with."""
    dtype: torch.dtype = getattr(torch, recipe.reference)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return Model(workload, device, dtype)


class _PlanWork:
    """One plan as work for a clock; see ``fp8tune.timing.clock.Work``."""

    signature: Any = None

    def __init__(self, race: Race, plan: PlanNames) -> None:
        self.variant = "+".join(sorted(plan)) or "reference"
        self._race = race
        self.plan = plan

    def __call__(self) -> None:
        self._race.switch(self.plan)
        self._race.step()


class Race:
    """A workload's model, and the plans that it can be switched to.

    Args:
        workload: what runs.
        recipe: what Linears and grouped GEMMs are converted to.
        device: where.
        clock: what times it.
        compiled: whether the model is compiled, as AutoFloat8 compiles it.

    Attributes:
        gemms: those of the model, by name.
    """

    def __init__(
        self,
        workload: Workload,
        recipe: Recipe,
        device: torch.device,
        clock: Clock,
        *,
        compiled: bool,
    ) -> None:
        self._model = model_of(workload, recipe, device)
        self._device = device
        self._recipe = recipe
        self._clock = clock
        self.gemms: dict[str, nn.Linear] = dict(named_gemms(self._model))
        self._converted: set[str] = set()
        if compiled:
            self._model.compile(**with_recipe_settings(COMPILE, [recipe]))

    def switch(self, plan: PlanNames) -> None:
        """Convert exactly these Linears and grouped GEMMs."""
        for name in self._converted - plan:
            self._recipe.revert(self.gemms[name])
        for name in plan - self._converted:
            self._recipe.convert(self.gemms[name])
        self._converted = set(plan)

    def step(self) -> None:
        """Forward + backward; gradients are dropped."""
        parameters = list(self._model.parameters())
        torch.autograd.grad(self._model(), parameters, self._model.grad_output)

    def run(
        self,
        plans: Sequence[PlanNames],
        more: Sequence[PlanNames],
        *,
        max_seconds: float,
        max_compile_seconds: float,
    ) -> dict[PlanNames, tuple[float, ...]]:
        """Times in milliseconds of each plan, by round.

        Args:
            plans: those that must run.
            more: those that run if they are compiled in time.
            max_seconds: when to stop, after at least eight rounds and at most 64.
            max_compile_seconds: when to begin, without the rest of ``more``.
        """
        deadline = self._clock.now() + max_compile_seconds
        work: list[_PlanWork] = []
        for plan in dict.fromkeys([*plans, *more]):
            if plan in plans or self._clock.now() < deadline:
                work.append(_PlanWork(self, plan))
                self._clock.warm_up(work[-1:])
        rounds = self._rounds(work, self._clock.now() + max_seconds)
        columns = zip(*rounds, strict=True)
        return dict(zip([x.plan for x in work], columns, strict=True))

    def _rounds(
        self, work: Sequence[_PlanWork], deadline: float
    ) -> list[tuple[float, ...]]:
        rounds: list[tuple[float, ...]] = []
        while len(rounds) < _MOST_ROUNDS:
            if len(rounds) >= FIRST_LOOK and self._clock.now() > deadline:
                break
            order = balanced_order(len(work), len(rounds))
            times = self._clock.time_ms([work[i] for i in order])
            ordered = dict(zip(order, times, strict=True))
            rounds.append(tuple(ordered[i] for i in range(len(work))))
        return rounds

    def peak_bytes(self, plan: PlanNames) -> int | None:
        """Most bytes that a step allocates at a time, or None on a CPU."""
        return peak_bytes(self._device, _PlanWork(self, plan))
