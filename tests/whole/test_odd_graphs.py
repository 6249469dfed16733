"""Calls under torch.func, graphs that outlive a backward, results nobody can see into."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from fp8tune import AutoFloat8, PhaseError, Reason, TuneConfig
from tests.helpers import all_faster, hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = TuneConfig(static_filter="divisible", include_output_layer=True)


class Model(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:
            return checkpoint(self.mlp, x, use_reentrant=False)
        return self.mlp(x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture
def tune(scripted_clock: type) -> Callable[..., AutoFloat8]:
    def tune(module: nn.Module, **options: Any) -> AutoFloat8:
        clock = scripted_clock(all_faster, lambda _: 1.0)
        return AutoFloat8(module, clock=clock, **{"config": EVERY, **options})

    return tune


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]


def loss_of(weights: Any, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional_call(model, weights, (x,)).square().mean()


@pytest.mark.parametrize("per_sample", [False, True])
def test_layers_that_run_under_torch_func_stay_in_high_precision_and_are_named(
    tune: Callable[..., AutoFloat8], caplog: pytest.LogCaptureFixture, per_sample: bool
) -> None:
    model = Model()
    weights = dict(model.named_parameters())
    x = torch.randn(16, 32)
    gradient: Any = grad(loss_of)
    if per_sample:
        gradient, x = vmap(gradient, in_dims=(None, None, 0)), x[:, None]
    expected = gradient(weights, model, x)
    auto = tune(model)
    for _ in range(3):
        found = gradient(weights, model, x)
        assert all(torch.equal(found[name], expected[name]) for name in weights)
    assert auto.frozen
    reasons = {x.reason for x in auto.plan.decisions}
    assert reasons == {Reason.FUNCTION_TRANSFORM}
    said = [x for x in warnings_in(caplog) if "torch.func" in x]
    assert len(said) == 1
    assert said[0].startswith("up is called under torch.func (grad, vmap and the like)")
    assert hooks_of(model) == {}


class Penalised(Model):
    def penalty(self) -> torch.Tensor:
        weights = {"weight": self.down.weight, "bias": self.down.bias}

        def energy(x: torch.Tensor) -> torch.Tensor:
            return functional_call(self.down, weights, (x,)).square().sum()

        return grad(energy)(torch.ones(4, 64)).square().mean()


def test_only_the_layer_that_runs_under_torch_func_is_left_out(
    tune: Callable[..., AutoFloat8],
) -> None:
    model = Penalised()
    auto = tune(model)
    for _ in range(5):
        loss = model(torch.randn(16, 32)).square().mean() + model.penalty().detach()
        loss.backward()
    assert auto.frozen
    assert auto.plan.converted_fqns == ["up"]
    assert auto.plan["down"].reason is Reason.FUNCTION_TRANSFORM


def test_gradients_in_a_batch_are_not_kept(tune: Callable[..., AutoFloat8]) -> None:
    auto = tune(nn.Sequential(nn.Linear(32, 32)), recipe="bf16")
    for _ in range(5):
        y = auto(torch.randn(4, 32, requires_grad=True)).sum(0)
        torch.autograd.grad(
            y, auto.module[0].weight, torch.eye(32), is_grads_batched=True
        )
    assert auto.frozen
    assert auto.plan["0"].reason is Reason.FASTER


def test_a_checkpointed_graph_that_is_retained_holds_up_the_freeze(
    tune: Callable[..., AutoFloat8],
) -> None:
    auto = tune(Model(checkpointed=True), warmup_steps=1)
    x = torch.randn(16, 32)
    first = auto(x).square().mean()
    first.backward(retain_graph=True)
    with pytest.raises(PhaseError, match="1 forward passes wait for their backward"):
        auto.freeze()
    before = auto.module.up.weight.grad.clone()
    auto(x).square().mean().backward()
    assert not auto.frozen
    auto.module.up.weight.grad = None
    first.backward()  # recomputes the layers as what they were
    assert torch.equal(auto.module.up.weight.grad, before)
    auto(x).square().mean().backward()
    assert auto.frozen


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loops_that_always_hold_a_retained_graph(
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
    checkpointed: bool,
) -> None:
    """Frozen where nothing is recomputed; otherwise the cause is named, once."""
    auto = tune(Model(checkpointed=checkpointed), warmup_steps=1)
    for _ in range(15):
        loss = auto(torch.randn(16, 32)).square().mean()
        loss.backward(retain_graph=True)
    assert auto.frozen is not checkpointed
    said = [x for x in warnings_in(caplog) if "are alive after their backward" in x]
    assert len(said) == checkpointed
    del loss
    auto(torch.randn(16, 32)).square().mean().backward()
    assert auto.frozen


class Hidden:
    """Holds a loss where nobody finds it."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.backward = loss.backward


class HidesItsLoss(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return Hidden(super().forward(x).square().mean())


@pytest.mark.parametrize("compiled", [False, True])
def test_results_that_nobody_can_see_into(
    tune: Callable[..., AutoFloat8], caplog: pytest.LogCaptureFixture, compiled: bool
) -> None:
    """The plan is that of the layers; a trial, which needs the end of backward, is not."""
    options = {"compile": lambda _: None} if compiled else {}
    auto = tune(HidesItsLoss(), warmup_steps=2, **options)
    x = torch.randn(16, 32)
    held = auto(x)
    auto(x)
    assert auto.phase == "warmup"
    with pytest.raises(PhaseError, match="wait for their backward"):
        auto.freeze()
    held.backward()
    auto(x).backward()
    auto(x).backward()
    assert auto.frozen
    assert auto.plan.converted_fqns == ["up", "down"]
    said = [x for x in warnings_in(caplog) if "no tensor was found in what" in x]
    assert len(said) == compiled


def keeps_outputs(auto: AutoFloat8, steps: int) -> None:
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.0)
    kept = []
    for _ in range(steps):
        output = auto(torch.randn(8, 32))
        kept.append(auto(torch.randn(8, 32)))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_steps_that_begin_among_results_of_earlier_ones_are_no_obstacle(
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = tune(Model(), warmup_steps=2)
    keeps_outputs(auto, 15)
    assert auto.phase == "frozen"
    assert auto.plan.converted_fqns == ["up", "down"]
    assert warnings_in(caplog) == []


def test_where_layers_are_recomputed_such_steps_are_waited_for_and_said(
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    auto = tune(Model(checkpointed=True), warmup_steps=2)
    keeps_outputs(auto, 30)
    assert auto.phase == "warmup"
    (said,) = warnings_in(caplog)
    assert "results of earlier steps are kept and may be differentiated yet" in said


def test_no_plans_are_tried_in_such_steps(
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = TuneConfig(trial_steps=40, static_filter="divisible")
    auto = tune(Model(), warmup_steps=2, config=config)
    keeps_outputs(auto, 40)
    assert auto.phase == "frozen"
    (said,) = warnings_in(caplog)
    assert "plans cannot be compared: each step begins while results" in said
    assert auto.plan.converted_fqns == ["up", "down"]
