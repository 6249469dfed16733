"""Two ranks try plans together: one plan per step, one winner, the slower rank's."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.timing.cpu_clock import CpuClock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

    from fp8tune.timing.clock import Work
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
    return auto.plan.converted_fqns, active, [x.layers for x in auto.plan.trials]


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


class Stage(nn.Module):
    """Half of a model; notes which of its layers are converted in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        converted = [type(layer) is not nn.Linear for layer in (self.up, self.down)]
        self.seen.append((converted[0], converted[1]))
        return self.down(torch.relu(self.up(x)))


def auto_of_a_stage(group: dist.ProcessGroup | None) -> tuple[AutoFloat8, Stage]:
    """In the first stage only `up` gains in whole steps, in the second only `down`."""
    from tests.conftest import ScriptedClock  # noqa: PLC0415 - in the rank's process

    gains, costs = ("up", "down") if dist.get_rank() == 0 else ("down", "up")
    clock = ScriptedClock(
        lambda _, variant: 1.0 if variant == "reference" else 0.5,
        lambda names: (
            10.0
            - 2.0 * any(gains in x for x in names)
            + 2.0 * any(costs in x for x in names)
        ),
    )
    stage = Stage()
    stages = nn.ModuleDict({f"stage{dist.get_rank()}": stage})
    stages.forward = stage.forward
    auto = AutoFloat8(
        stages,
        recipe="bf16",
        warmup_steps=2,
        clock=clock,
        process_group=group,
        config=TuneConfig(trial_steps=60),
    )
    return auto, stage


def schedule_of(
    kind: type[PipelineScheduleSingle], auto: AutoFloat8, micro_batches: int
) -> Callable[[], object]:
    rank = dist.get_rank()
    stage = PipelineStage(auto, rank, 2, torch.device("cpu"))
    schedule = kind(stage, micro_batches, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(auto.parameters(), lr=1e-2)

    def step() -> None:
        if rank == 0:
            schedule.step(torch.ones(16, 32))
        else:
            schedule.step(target=torch.zeros(16, 32))
        optimizer.step()
        optimizer.zero_grad()

    return step


def try_plans_in_stages(kind: type[PipelineScheduleSingle]) -> object:
    """(phases, layers converted in each forward of each step, winner) of this stage."""
    own, _ = dist.new_subgroups(1)
    auto, stage = auto_of_a_stage(own)
    step = schedule_of(kind, auto, micro_batches=4)
    phases: list[str] = []
    for _ in range(68):
        step()
        phases.append(str(auto.phase))
    seen = stage.seen[len(stage.seen) % 4 :]
    steps = [set(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    return phases, steps, auto.plan.converted_fqns


@pytest.mark.parametrize("kind", [ScheduleGPipe, Schedule1F1B])
def test_two_pipeline_stages_try_plans_each_for_itself(
    kind: type[PipelineScheduleSingle], ranks: Ranks
) -> None:
    """With trial_steps=60: no micro-batch of a step runs another plan than the rest."""
    answers = ranks(2, try_plans_in_stages, kind)
    assert set(answers) == {0, 1}
    for rank, (phases, steps, winner) in answers.items():
        assert set(phases) == {"warmup", "trial", "frozen"}
        assert phases[-1] == "frozen"
        assert phases.count("trial") >= 30
        assert len(steps) >= 60
        assert [x for x in steps if len(x) > 1] == []
        assert len(set.union(*steps)) >= 3
        assert winner == [f"stage{rank}.{'down' if rank else 'up'}"]


def stages_in_one_group() -> object:
    """Warnings, and the phase between steps after an early freeze."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("fp8tune").addHandler(handler)
    auto, _ = auto_of_a_stage(None)
    step = schedule_of(ScheduleGPipe, auto, micro_batches=2)
    step()
    auto.freeze()
    step()
    return lines, str(auto.phase), len(auto.plan.trials)


def test_stages_in_one_group_are_not_tried_and_it_is_said(ranks: Ranks) -> None:
    answers = ranks(2, stages_in_one_group)
    assert [x[1:] for x in answers.values()] == [("frozen", 0)] * 2
    (warning,) = answers[0][0]
    assert warning.startswith("trial_steps=60 asks for a trial of whole plans, but")
    assert "process_group=" in warning
    assert answers[1][0] == []
