"""AutoFloat8 let loose on one block, as a user gets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8tune.auto import AutoFloat8
from fp8tune.bench.race import COMPILE, PlanNames, model_of

if TYPE_CHECKING:
    import torch

    from fp8tune.bench.sizes import Workload
    from fp8tune.config import TuneConfig
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock

__all__ = ["Choice", "tune"]

# More than the warmup and the trial of the default TuneConfig take.
_MOST_STEPS = 1000


@dataclass(frozen=True)
class Choice:
    """A plan, and what finding it took, where it had to be measured."""

    plan: PlanNames
    seconds: float | None = None
    warm_up_s: float | None = None
    steps: int | None = None
    tried: int | None = None


class _Stopwatch:
    """A clock that also counts what warming up takes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.warm_up_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)

    def warm_up(self, work: Any) -> None:
        started = self._clock.now()
        self._clock.warm_up(work)
        self.warm_up_s += self._clock.now() - started


def tune(
    workload: Workload,
    recipe: Recipe,
    device: torch.device,
    clock: Clock,
    config: TuneConfig,
    *,
    compiled: bool,
) -> Choice:
    """What AutoFloat8 chooses, as a user gets it."""
    model = model_of(workload, recipe, device)
    stopwatch: Any = _Stopwatch(clock)
    started, steps = clock.now(), 0
    auto = AutoFloat8(
        model,
        recipe=recipe,
        compile=COMPILE if compiled else False,
        config=config,
        clock=stopwatch,
    )
    while not auto.frozen and steps < _MOST_STEPS:
        auto().backward(model.grad_output)
        auto.zero_grad()
        steps += 1
    plan = auto.freeze()
    seconds = clock.now() - started
    chosen = PlanNames(plan.converted_fqns)
    return Choice(chosen, seconds, stopwatch.warm_up_s, steps, len(plan.trials))
