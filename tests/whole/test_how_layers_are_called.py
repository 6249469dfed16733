"""Linears that are called in other ways than most: by keyword, or without gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.recipes import BFloat16Linear
from tests.helpers import all_faster


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


def train(auto: AutoFloat8, steps: int = 3) -> None:
    for _ in range(steps):
        auto(torch.randn(8, 32)).square().mean().backward()
        auto.zero_grad()


@pytest.mark.parametrize("steps", [0, 20])
def test_a_linear_that_gets_its_input_by_keyword(
    scripted_clock: type, steps: int
) -> None:
    """In the warmup and in a trial; what is kept for timing is its real input."""
    auto = AutoFloat8(
        ByKeyword(),
        recipe="bf16",
        warmup_steps=2,
        clock=scripted_clock(all_faster, lambda names: 10.0 - len(names)),
        config=TuneConfig(trial_steps=steps),
    )
    train(auto, 3 + steps)
    decision = auto.plan["layer"]
    assert [(x.shape.m, calls) for x, calls in decision.signatures] == [(8, 2)]
    assert auto.plan.converted_fqns == ["layer"]
    assert type(auto.module.layer) is BFloat16Linear


def test_the_input_of_a_call_by_keyword_is_what_is_timed() -> None:
    auto = AutoFloat8(
        ByKeyword(), recipe="bf16", warmup_steps=2, config=TuneConfig(max_samples=8)
    )
    train(auto)
    (measurement,) = auto._tuner._pipeline.run.measurements
    assert not measurement.synthetic


@pytest.mark.parametrize("steps", [0, 2])
def test_a_lazy_linear_has_its_shape_after_the_first_forward(
    scripted_clock: type, steps: int
) -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 8))
    clock = scripted_clock(all_faster)
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=steps, clock=clock)
    train(auto, 4)
    assert auto.plan["1"].signatures[0][0].shape.m == 8
    assert model[0].weight.shape == (16, 32)


class WithTeacher(nn.Module):
    """A student, and in the same forward a teacher that is not differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(32, 16)
        self.teacher = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self.teacher(x.clone().requires_grad_())
        return self.student(x) - target


def test_a_linear_without_gradients_in_a_forward_of_training(
    scripted_clock: type,
) -> None:
    """It is timed as it runs, forward alone, though its weight requires a gradient."""
    clock = scripted_clock(all_faster)
    auto = AutoFloat8(WithTeacher(), recipe="bf16", warmup_steps=2, clock=clock)
    train(auto)
    ((student, seen),) = auto.plan["student"].signatures
    ((teacher, also),) = auto.plan["teacher"].signatures
    assert (seen, also) == (2, 2)
    assert (student.grad_weight, student.grad_bias) == (True, True)
    assert (teacher.grad_input, teacher.grad_weight, teacher.grad_bias) == (
        False,
        False,
        False,
    )
    assert {signature for signature, _ in clock.timed} == {student, teacher}
