"""The peak of memory that is told of a trial plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from fp8tune.ranks.group import Ranks
from fp8tune.trial.results import results_of
from fp8tune.trial.roles import Role
from fp8tune.trial.search import Search, TrialPlan
from fp8tune.trial.steps import Trial


class Memory:
    """A device whose peak is this many bytes in each step."""

    def __init__(self) -> None:
        self.peak = 0

    def reset(self) -> None:
        pass

    def read(self) -> int:
        return self.peak


class Clock:
    """Steps of one millisecond."""

    def now(self) -> float:
        return 0.0

    def mark(self) -> None:
        pass

    def elapsed_ms(self, *_: object) -> float:
        return 1.0


def test_steps_that_compile_are_left_out_of_a_plans_peak() -> None:
    role = Role(name="up", fqns=("up",), family="u", gain_ms=1.0, spread_ms=1.0)
    search = Search(
        [role], TrialPlan([role]), confidence=0.95, min_speedup=1.0, max_steps=40
    )
    steps = cast(
        "Any",
        SimpleNamespace(
            begin=bool,
            passes_in_step=1,
            passes_without_gradient=1,
            saw_gradient=bool,
        ),
    )
    memory, ran = Memory(), dict[TrialPlan, int]()

    def switch(plan: TrialPlan) -> None:
        ran[plan] = ran.get(plan, 0) + 1
        # Compiling allocates 900 bytes, training 100 and 10 for each converted role.
        memory.peak = 900 if ran[plan] <= 2 else 100 + 10 * len(plan)

    trial = Trial(
        search,
        steps,
        switch,
        cast("Any", Clock()),
        Ranks(),
        memory=cast("Any", memory),
    )
    x = torch.ones(1, requires_grad=True)
    while not trial.settled:
        trial.before()
        output = x * 2
        trial.after(output)
        output.sum().backward()
    results = results_of(search, trial.peaks)
    assert {(x.converted, x.peak_bytes) for x in results} == {
        ((), 100),
        (("up",), 110),
    }
