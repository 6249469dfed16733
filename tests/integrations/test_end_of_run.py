"""Trainers without a hook at their end: a run that is too short is said all the same."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import nn

from fp8tune import AutoFloat8
from fp8tune.recipes import BFloat16Linear
from tests.helpers import hooks_of, widening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS = 2


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def steps(model: nn.Module, optimizer: Any, backward: Callable[..., Any]) -> None:
    for _ in range(STEPS):
        backward(model(torch.randn(8, 16)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def in_fabric(auto: AutoFloat8) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    steps(*fabric.setup(auto, optimizer), fabric.backward)


def in_accelerate(auto: AutoFloat8) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    steps(*accelerator.prepare(auto, optimizer), accelerator.backward)
    accelerator.end_training()


RUNS = [in_fabric, in_accelerate]


@pytest.mark.parametrize("bare", [False, True], ids=["wrapper", "bare model"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_too_short_is_said_when_the_model_is_let_go_of(
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
    run: Callable[[nn.Module], None],
    *,
    bare: bool,
) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    clock = scripted_clock(widening)
    auto = AutoFloat8(model, "bf16", warmup_steps=3, clock=clock)
    run(model if bare else auto)
    del model, auto
    gc.collect()
    (said,) = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert "training ended before tuning did: 1 of 3 warmup steps were seen" in said
    assert "Train for more than 3 steps" in said


@pytest.mark.parametrize("bare", [False, True], ids=["wrapper", "bare model"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_long_enough_ends_with_its_plan_and_nothing_left(
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
    run: Callable[[nn.Module], None],
    *,
    bare: bool,
) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    clock = scripted_clock(widening)
    auto = AutoFloat8(model, "bf16", warmup_steps=1, clock=clock)
    run(model if bare else auto)
    assert auto.plan.converted_fqns == ["0"]
    assert [type(x) for x in model] == [BFloat16Linear, nn.Linear]
    assert hooks_of(model) == {}
    del model, auto
    gc.collect()
    assert [x for x in caplog.records if x.levelno == logging.WARNING] == []
