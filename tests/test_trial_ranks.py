"""Two ranks try plans together: one plan per step, one winner, the slower rank's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.clock import CpuClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.clock import Work
    from tests.conftest import Ranks

pytestmark = pytest.mark.dist


class TwiceAsFastAlone(CpuClock):
    """Layers are scripted to gain alone; training steps are really timed."""

    def warm_up(self, work: Sequence[Work]) -> None:
        del work

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        return [1.0 if x.variant == "reference" else 0.5 for x in work]


class Sleepy(nn.Module):
    """On the slow rank a converted layer costs 16 ms; on the other it gains 8."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        converted = type(self.layer) is not nn.Linear
        if dist.get_rank() == 1:
            time.sleep(0.020 if converted else 0.004)
        else:
            time.sleep(0.000 if converted else 0.008)
        return self.layer(x)


def try_plans(*, inside: bool) -> object:
    auto = AutoFloat8(
        Sleepy(),
        recipe="bf16",
        warmup_steps=1,
        clock=TwiceAsFastAlone(),
        config=TuneConfig(trial_steps=60),
    )
    model = DistributedDataParallel(auto) if inside else auto
    active: list[bool] = []
    for _ in range(80):
        model(torch.ones(4, 32)).sum().backward()
        active.append(type(auto.module.layer) is not nn.Linear)
        model.zero_grad()
    return auto.plan.float8_fqns, active, [x.layers for x in auto.plan.trials]


def in_ddp() -> object:
    return try_plans(inside=True)


def without_messages_between_ranks() -> object:
    return try_plans(inside=False)


@pytest.mark.parametrize("run", [in_ddp, without_messages_between_ranks])
def test_ranks_of_different_speed_end_with_the_same_winner(
    run: object, ranks: Ranks
) -> None:
    answers = ranks(2, run)
    assert answers[0] == answers[1]
    converted, active, tried = answers[0]
    assert converted == []
    assert {True, False} == set(active)
    assert sorted(tried) == [0, 1]
