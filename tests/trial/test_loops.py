"""Start to start: what a plan costs the loop, on a simulated GPU and beside evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from fp8tune.ranks.group import Ranks
from fp8tune.timing.cuda_clock import CudaClock
from fp8tune.trial.search import Role, Search, TrialPlan
from fp8tune.trial.steps import Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulated_gpu import SimulatedGpu

ROLE = Role(name="w", fqns=("w",), gain_ms=1.0)
WITH = TrialPlan([ROLE])


class EachIsAStep:
    """Every forward begins a step."""

    completed = over = 0
    passes_in_step = passes_without_gradient = 1

    def begin(self) -> bool:
        return True

    def saw_gradient(self) -> None:
        pass


class NoMemory:
    """A device that does not tell."""

    def reset(self) -> None:
        pass

    def read(self) -> None:
        return None


def trial_of(
    clock: Any, switch: Callable[[TrialPlan], None], steps: int = 200
) -> Trial:
    search = Search([ROLE], WITH, max_steps=steps)
    parts = cast("tuple[Any, Any]", (EachIsAStep(), NoMemory()))
    return Trial(search, parts[0], switch, clock, Ranks(), memory=parts[1])


def go(
    trial: Trial, forward: Callable[[], object], between: Callable[[], object]
) -> None:
    x = torch.ones(1, requires_grad=True)
    while not trial.settled:
        trial.before((x,))
        forward()
        output = x * 2
        trial.after(output)
        output.sum().backward()
        between()


class Loop:
    """A training loop on the simulated GPU.

    Args:
        gpu: the simulation.
        kernels: (how many, microseconds of each) of a step without and with the plan.
        waits: the loop reads the loss in every step.
        optimizer: how many kernels of 5 us it launches without and with the plan.
    """

    def __init__(
        self,
        gpu: SimulatedGpu,
        kernels: tuple[tuple[int, float], tuple[int, float]],
        *,
        waits: bool,
        optimizer: tuple[int, int] = (20, 20),
    ) -> None:
        self._gpu = gpu
        self._kernels = kernels
        self._waits = waits
        self._launches = optimizer
        self._plan = TrialPlan()
        self.trial = trial_of(CudaClock(torch.device("cuda", 0)), self._switch)

    def _switch(self, plan: TrialPlan) -> None:
        self._plan = plan

    def _step(self) -> None:
        number, microseconds = self._kernels[bool(self._plan)]
        for _ in range(number):
            self._gpu.launch(microseconds)

    def _optimizer(self) -> None:
        if self._waits:
            self._gpu.synchronize()
        for _ in range(self._launches[bool(self._plan)]):
            self._gpu.launch(5.0)
        # Behind it the next forward and backward are queued before the GPU gets there.
        self._gpu.launch(3000.0)

    def run(self) -> Search:
        go(self.trial, self._step, self._optimizer)
        return self.trial.search


def test_a_plan_that_costs_the_cpu_more_than_it_saves_the_gpu_is_vetoed(
    gpu: SimulatedGpu,
) -> None:
    """1.13x by the span, 0.8x from start to start: the optimizer launches more."""
    loop = Loop(gpu, ((100, 100.0), (100, 88.0)), waits=True, optimizer=(40, 1000))
    search = loop.run()
    rows = [x for x in search.seen.log[2:] if len(x) == 2]
    assert all(x[0].ms / x[1].ms == pytest.approx(1.13, abs=0.01) for x in rows)
    assert all(x[0].device_ms / x[1].device_ms < 0.85 for x in rows)
    assert search.best == TrialPlan()
    assert search.seen.bound_elsewhere


def test_a_plan_that_launches_more_wins_a_loop_that_the_gpu_bounds(
    gpu: SimulatedGpu,
) -> None:
    """The CPU runs ahead of the GPU, so its own clock shows launches and no step."""
    search = Loop(gpu, ((40, 100.0), (60, 53.0)), waits=False).run()
    assert search.best == WITH
    rows = [x for x in search.seen.log if len(x) == 2]
    walls = [x[1].wall_ms / x[0].wall_ms for x in rows[4:]]
    assert sorted(walls)[len(walls) // 2] > 1.2  # by the CPU's clock it would be slower
    assert not search.seen.bound_elsewhere
    assert not search.seen.is_vetoed(1)


def test_start_to_start_on_the_device_is_what_the_loop_takes(gpu: SimulatedGpu) -> None:
    search = Loop(gpu, ((40, 100.0), (40, 80.0)), waits=True).run()
    for row in search.seen.log[4:]:
        for plan, step in row.items():
            kernels_ms = 40 * (80.0 if plan else 100.0) / 1e3
            assert step.ms == pytest.approx(kernels_ms, rel=0.02)
            # And the optimizer's 20 kernels of 5 us and one of 3 ms.
            assert step.device_ms == pytest.approx(kernels_ms + 3.1, rel=0.03)


class ByHand:
    """A clock that is set forward by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    mark = now

    def elapsed_ms(self, start: float, end: float, what: object) -> float:
        del what
        return (end - start) * 1e3


def test_an_evaluation_is_no_part_of_a_step() -> None:
    clock = ByHand()
    trial = trial_of(clock, lambda plan: None, steps=60)
    evaluations = iter(range(1000))

    def between() -> None:
        clock.seconds += 0.002
        if next(evaluations) % 5 == 0:
            trial.disturbed()
            clock.seconds += 100.0

    go(trial, lambda: setattr(clock, "seconds", clock.seconds + 0.01), between)
    steps = [x for row in trial.search.seen.log for x in row.values()]
    known = [x for x in steps if x.wall_ms]
    assert len(known) == pytest.approx(0.8 * len(steps), abs=1)
    assert {round(x.wall_ms) for x in known} == {12}
    assert {round(x.device_ms) for x in known} == {12}
    assert trial.search.seen.seconds < 1.0
