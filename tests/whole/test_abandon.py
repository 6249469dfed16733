"""The model back in high precision, at any time; plans that are undone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, ModelError, PhaseError, TuneConfig
from fp8tune.recipes import BFloat16Linear
from tests.helpers import hooks_of


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def step(module: nn.Module) -> None:
    module.zero_grad()
    module(torch.ones(8, 32)).square().mean().backward()


def tune(scripted_clock: type, steps: int, trial_steps: int = 0) -> AutoFloat8:
    clock = scripted_clock(
        lambda _, variant: 1.0 if variant == "reference" else 0.5, lambda _: 1.0
    )
    config = TuneConfig(trial_steps=trial_steps)
    auto = AutoFloat8(
        model(), recipe="bf16", warmup_steps=1, clock=clock, config=config
    )
    for _ in range(steps):
        step(auto)
    return auto


@pytest.mark.parametrize(
    ("steps", "trial_steps", "phase"),
    [(0, 0, "warmup"), (1, 0, "warmup"), (3, 200, "trial"), (3, 0, "frozen")],
)
def test_abandon_leaves_the_bare_model(
    scripted_clock: type, steps: int, trial_steps: int, phase: str
) -> None:
    auto = tune(scripted_clock, steps, trial_steps)
    assert auto.phase == phase
    auto.abandon()
    auto.abandon()
    assert auto.phase == "abandoned"
    assert auto.plan is None
    plain = vars(nn.Linear(1, 1)).keys() | {"_compiled_call_impl"}
    for linear in (auto.module[0], auto.module[2]):
        assert type(linear) is nn.Linear
        assert vars(linear).keys() <= plain
    assert "forward" not in vars(auto.module)
    assert hooks_of(auto.module) == {}
    step(auto)
    with pytest.raises(PhaseError, match="tuning was abandoned"):
        auto.freeze()


@pytest.mark.parametrize(
    ("steps", "trial_steps", "phase"), [(1, 0, "warmup"), (3, 200, "trial")]
)
def test_a_model_that_is_being_tuned_is_not_wrapped_again(
    scripted_clock: type, steps: int, trial_steps: int, phase: str
) -> None:
    auto = tune(scripted_clock, steps, trial_steps)
    assert auto.phase == phase
    for part in (auto, auto.module, auto.module[0]):
        with pytest.raises(ModelError, match="another AutoFloat8 tunes this model"):
            AutoFloat8(part, recipe="bf16")
    auto.abandon()
    assert AutoFloat8(auto.module, recipe="bf16").phase == "warmup"


def test_a_plan_is_reverted_and_brings_its_recipe(scripted_clock: type) -> None:
    plan = tune(scripted_clock, 3).plan
    other = model()
    auto = AutoFloat8(other, plan=plan)
    assert auto.plan.recipe == "bf16"
    assert type(other[0]) is BFloat16Linear
    plan.revert(other)
    assert type(other[0]) is type(other[2]) is nn.Linear
