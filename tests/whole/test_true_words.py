"""What the plan and its table say is so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, Reason, TuneConfig
from tests.helpers import all_faster, widening

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = TuneConfig(static_filter="divisible")


class Sometimes(nn.Module):
    """Two Linears that are called as asked for, beside one that always is."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(16, 16)
        self.other = nn.Linear(16, 32)
        self.unused = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, rows: int = 0) -> torch.Tensor:
        self.other(x[:rows].detach())
        return self.always(x).square().mean()


@pytest.fixture
def tune(scripted_clock: type) -> Callable[..., AutoFloat8]:
    def tune(model: nn.Module, recipe: str = "bf16", **options: object) -> AutoFloat8:
        clock = scripted_clock(all_faster)
        return AutoFloat8(model, recipe, clock=clock, config=EVERY, **options)

    return tune


def test_never_called_is_said_only_where_nothing_called(
    tune: Callable[..., AutoFloat8],
) -> None:
    auto = tune(Sometimes(), warmup_steps=1)
    for _ in range(2):
        auto(torch.randn(8, 16)).backward()
        auto.zero_grad()
    reasons = {x.fqn: x.reason for x in auto.plan.decisions}
    assert reasons == {
        "always": Reason.FASTER,
        "other": Reason.WITHOUT_ROWS,
        "unused": Reason.NEVER_CALLED,
    }
    assert "1 without_rows, 1 never_called" in auto.plan.summary()


def test_a_freeze_before_the_first_gradient_does_not_say_never_called(
    tune: Callable[..., AutoFloat8],
) -> None:
    auto = tune(Sometimes())
    auto(torch.randn(8, 16), rows=4)
    plan = auto.freeze()
    assert plan["always"].reason is plan["other"].reason is Reason.NO_GRADIENT
    assert plan["unused"].reason is Reason.NEVER_CALLED
    assert "no gradient had come back" in plan["always"].reason.sentence


def test_what_evaluations_call_is_never_called_by_training(
    tune: Callable[..., AutoFloat8],
) -> None:
    auto = tune(Sometimes())
    with torch.no_grad():
        auto(torch.randn(8, 16), rows=4)
    assert {x.reason for x in auto.freeze().decisions} == {Reason.NEVER_CALLED}


@pytest.mark.parametrize(
    ("recipe", "autocast", "against"),
    [
        ("bf16", False, "float32"),
        ("bf16", True, "bfloat16"),
        ("rowwise", False, "float32"),
        ("rowwise", True, "bfloat16"),
    ],
)
def test_the_table_names_the_dtype_that_was_timed_against(
    tune: Callable[..., AutoFloat8], recipe: str, autocast: bool, against: str
) -> None:
    auto = tune(nn.Sequential(nn.Linear(16, 32)), recipe, warmup_steps=1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            auto(torch.randn(8, 16)).float().square().mean().backward()
    assert f"timed eager against {against} on" in str(auto.plan)


def test_trial_plans_are_named_by_the_dtype_too(scripted_clock: type) -> None:
    clock = scripted_clock(widening, lambda _: 1.0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    config = TuneConfig(static_filter="divisible", trial_steps=12)
    auto = AutoFloat8(model, "bf16", clock=clock, config=config, warmup_steps=1)
    while not auto.frozen:
        with torch.autocast("cpu", torch.bfloat16):
            auto(torch.randn(8, 16)).float().square().mean().backward()
        auto.zero_grad()
    assert "all bfloat16" in str(auto.plan)
    assert "float32" not in str(auto.plan)


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_timed_with_frozen_weights_are_said_to_be(
    tune: Callable[..., AutoFloat8], frozen: bool
) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    model[0].requires_grad_(not frozen)
    auto = tune(model, warmup_steps=1)
    for _ in range(2):
        auto(torch.randn(8, 16, requires_grad=True)).square().mean().backward()
        auto.zero_grad()
    said = "1 Linears were timed with frozen weights; if they are unfrozen"
    assert (said in str(auto.plan)) is frozen
