"""Tuning goes on in another process from what a checkpoint holds, or begins anew."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, PhaseError, Plan, PlanMismatchError, TuneConfig
from fp8tune.decision.reasons import Reason
from tests.helpers import widening


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))


def steps(auto: AutoFloat8, optimizer: Any, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
        loss = auto(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wrapped(clock: object, bare: nn.Module, **options: Any) -> tuple[AutoFloat8, Any]:
    auto = AutoFloat8(bare, recipe="bf16", clock=clock, **options)
    return auto, torch.optim.AdamW(bare.parameters(), lr=1e-2)


def verdicts(plan: Plan | None) -> list[object]:
    assert plan is not None
    return [
        (x.fqn, x.verdict, x.reason, x.recipe, x.signatures, x.speedup, x.samples)
        for x in plan.decisions
    ]


def trial_ms(converted: set[str]) -> float:
    return 10.0 - len(converted)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_was_stopped_in_warmup_goes_on(
    scripted_clock: type, at: int
) -> None:
    whole, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=3)
    expected = steps(whole, optimizer, range(8))

    first, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=3)
    losses = steps(first, optimizer, range(at))
    state = json.loads(json.dumps(first.tuning_state()))
    again, other = wrapped(scripted_clock(widening), model(), warmup_steps=3)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    again.load_tuning_state(state)
    losses += steps(again, other, range(at, 8))

    assert losses == expected
    assert verdicts(again.plan) == verdicts(whole.plan)
    assert whole.plan.converted_fqns == ["0"]


def test_what_warmup_saw_is_in_the_state(scripted_clock: type) -> None:
    auto, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=5)
    steps(auto, optimizer, range(2))
    state = auto.tuning_state()
    assert state["phase"] == "warmup"
    assert state["seen"]["steps"] == 2
    assert [x[0][1] for x in state["seen"]["calls"].values()] == [2, 2]


@pytest.mark.parametrize("at", [4, 9, 23])
def test_a_run_that_was_stopped_in_the_trial_goes_on(
    scripted_clock: type, at: int
) -> None:
    options: dict[str, Any] = {
        "warmup_steps": 2,
        "config": TuneConfig(trial_steps=80),
    }
    whole, optimizer = wrapped(scripted_clock(widening, trial_ms), model(), **options)
    expected = steps(whole, optimizer, range(90))

    first, optimizer = wrapped(scripted_clock(widening, trial_ms), model(), **options)
    losses = steps(first, optimizer, range(at))
    state = json.loads(json.dumps(first.tuning_state()))
    assert state["phase"] == "trial"
    # Layers must not be timed again.
    clock = scripted_clock(widening, trial_ms)
    again, other = wrapped(clock, model(), **options)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    again.load_tuning_state(state)
    losses += steps(again, other, range(at, 90))

    assert not clock.timed
    assert again.phase == "frozen"
    assert again.plan.converted_fqns == whole.plan.converted_fqns == ["0", "2"]
    assert [x.reason for x in again.plan.decisions] == [
        x.reason for x in whole.plan.decisions
    ]
    assert losses == expected


@pytest.mark.parametrize("at", [5, 11])
def test_a_compiled_run_that_was_stopped_in_the_trial_ends_with_the_same_plan(
    scripted_clock: type, at: int
) -> None:
    """Each plan is compiled again, which takes two of its steps that are not timed."""
    options: dict[str, Any] = {"warmup_steps": 2, "compile": {"backend": "eager"}}
    whole, optimizer = wrapped(scripted_clock(widening, trial_ms), model(), **options)
    expected = steps(whole, optimizer, range(50))

    torch._dynamo.reset()
    first, optimizer = wrapped(scripted_clock(widening, trial_ms), model(), **options)
    losses = steps(first, optimizer, range(at))
    state = json.loads(json.dumps(first.tuning_state()))
    assert state["phase"] == "trial"
    clock = scripted_clock(widening, trial_ms)
    again, other = wrapped(clock, model(), **options)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    again.load_tuning_state(state)
    steps(again, other, range(at, 50))

    assert not clock.timed
    assert again.phase == whole.phase == "frozen"
    assert verdicts(again.plan) == verdicts(whole.plan)
    assert losses == expected[:at]


def test_a_frozen_state_is_its_plan(scripted_clock: type, silent_clock: object) -> None:
    auto, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=1)
    steps(auto, optimizer, range(3))
    again, _ = wrapped(silent_clock, model())
    again.load_tuning_state(json.loads(json.dumps(auto.tuning_state())))
    assert again.phase == "frozen"
    assert again.plan == auto.plan
    assert type(again.module[0]) is type(auto.module[0])


def test_a_state_comes_before_the_first_step(scripted_clock: type) -> None:
    auto, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=3)
    steps(auto, optimizer, range(2))
    with pytest.raises(PhaseError, match="call it right after"):
        auto.load_tuning_state(auto.tuning_state())


def test_a_state_of_another_model(scripted_clock: type) -> None:
    auto, optimizer = wrapped(scripted_clock(widening), model(), warmup_steps=1)
    steps(auto, optimizer, range(3))
    other, _ = wrapped(scripted_clock(widening), nn.Sequential(nn.Linear(16, 64)))
    with pytest.raises(PlanMismatchError, match="saved of another model"):
        other.load_tuning_state(auto.tuning_state())


def test_a_layer_unfrozen_later_is_timed_by_retune(scripted_clock: type) -> None:
    bare = model()
    bare[0].weight.requires_grad_(False)
    clock = scripted_clock(widening)
    auto, optimizer = wrapped(clock, bare, warmup_steps=1)
    steps(auto, optimizer, range(3))
    assert [x.grad_weight for x, _ in auto.plan["0"].signatures] == [False]

    bare[0].weight.requires_grad_(True)
    before = set(clock.timed)
    auto.retune()
    assert auto.phase == "warmup"
    steps(auto, optimizer, range(3, 6))
    assert [x.grad_weight for x, _ in auto.plan["0"].signatures] == [True]
    # What was known is not timed again.
    timed = {x.shape.k for x, _ in set(clock.timed) - before}
    assert timed == {16}
    assert auto.plan.converted_fqns == ["0"]


def test_retune_asks_only_for_what_is_not_known(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(widening)
    auto, optimizer = wrapped(clock, model(), warmup_steps=1)
    steps(auto, optimizer, range(3))
    timed, tuner, plan = clock.timed.copy(), auto.tuner, auto.plan
    auto.retune()
    assert auto.plan is None
    with caplog.at_level(logging.INFO, "fp8tune"):
        steps(auto, optimizer, range(3))
    assert clock.timed == timed
    assert auto.tuner is tuner
    assert verdicts(auto.plan) == verdicts(plan)
    assert auto.plan["2"].reason is Reason.SLOWER


def test_retune_of_a_compiled_model_names_the_way_out(scripted_clock: type) -> None:
    compiled: list[nn.Module] = []
    config = TuneConfig(trial_steps=0)
    auto, optimizer = wrapped(
        scripted_clock(widening),
        model(),
        warmup_steps=1,
        compile=compiled.append,
        config=config,
    )
    steps(auto, optimizer, range(3))
    with pytest.raises(PhaseError, match=r"auto.abandon\(\), which undoes compiling"):
        auto.retune()
    assert auto.phase == "frozen"
    auto.abandon()
    again, optimizer = wrapped(scripted_clock(widening), auto.module, warmup_steps=1)
    steps(again, optimizer, range(3))
    assert again.plan.converted_fqns == ["0"]


def test_retune_waits_for_no_backward(scripted_clock: type) -> None:
    auto, _ = wrapped(scripted_clock(widening), model())
    loss = auto(torch.ones(8, 16)).sum()
    with pytest.raises(PhaseError, match="wait for their backward"):
        auto.retune()
    del loss
    auto.retune()
    assert auto.phase == "warmup"


class Freezes(nn.Sequential):
    def freeze(self) -> str:
        return "the model's"


def test_names_of_the_model_are_not_hidden_in_silence(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fp8tune"):
        auto, _ = wrapped(scripted_clock(widening), Freezes(*model()))
    (line,) = [x.message for x in caplog.records if "has its own" in x.message]
    assert "its own freeze, and" in line
    assert "auto.module.freeze" in line
    assert "auto.tuner" in line
    assert auto.module.freeze() == "the model's"
