"""What counts as a training step, told from calls, gradients and optimizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8tune.model.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Iterator


class Two(nn.Module):
    """The second layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.fixture
def model() -> nn.Module:
    return Two()


@pytest.fixture
def steps(model: nn.Module) -> Iterator[Steps]:
    steps = Steps(model)
    yield steps
    steps.close()


def micro_batch(steps: Steps, model: nn.Module) -> bool:
    """A pass and its backward; whether the pass began a new step."""
    began = steps.begin()
    model(torch.ones(2, 4)).sum().backward()
    steps.saw_gradient()
    return began


def test_steps_of_an_optimizer_are_the_steps(steps: Steps, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    began: list[bool] = []
    for _ in range(3):
        began += [micro_batch(steps, model) for _ in range(4)]
        optimizer.step()  # gradients are never cleared
    assert began == [False] * 4 + [True, False, False, False] * 2
    assert steps.completed == 2


def test_micro_batches_of_the_very_first_step_are_one_step(
    steps: Steps, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert [micro_batch(steps, model) for _ in range(20)] == [False] * 20
    optimizer.step()
    assert micro_batch(steps, model)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clearing_gradients_without_a_step_ends_none(
    steps: Steps, model: nn.Module, *, set_to_none: bool
) -> None:
    """As a gradient scaler does when the loss overflows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    micro_batch(steps, model)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert not micro_batch(steps, model)
    optimizer.step()
    assert micro_batch(steps, model)


def test_without_an_optimizer_gradients_that_are_gone_end_a_step(
    steps: Steps, model: nn.Module
) -> None:
    micro_batch(steps, model)
    model.zero_grad()
    began = [micro_batch(steps, model) for _ in range(3)]
    assert began == [True, False, False]
    model.zero_grad()
    assert micro_batch(steps, model)


def test_a_frozen_layer_that_kept_its_gradient_does_not_count(
    steps: Steps, model: nn.Module
) -> None:
    model.idle.weight.grad = torch.ones(4, 4)
    model.idle.weight.requires_grad_(False)
    micro_batch(steps, model)
    for parameter in model.used.parameters():
        parameter.grad = None
    assert micro_batch(steps, model)


def test_with_neither_each_pass_with_its_backward_is_a_step(
    steps: Steps, model: nn.Module
) -> None:
    assert [micro_batch(steps, model) for _ in range(3)] == [False, True, True]
    steps.begin()
    assert not steps.begin()
    assert steps.passes_without_gradient == 2


def test_another_models_optimizer_ends_no_step(steps: Steps, model: nn.Module) -> None:
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(4, 4).parameters(), lr=0.1)
    micro_batch(steps, model)
    other.step()
    assert not micro_batch(steps, model)
    own.step()
    assert micro_batch(steps, model)


def test_weights_that_stand_in_while_the_model_is_called(model: nn.Module) -> None:
    """As functional_call has it; their optimizer steps when they are out again."""
    idle = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = {k: x.detach().requires_grad_() for k, x in model.named_parameters()}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    steps = Steps(model)
    model.register_forward_pre_hook(lambda *_: (steps.begin(), None)[1])
    for _ in range(4):
        functional_call(model, weights, (torch.ones(2, 4),)).sum().backward()
        steps.saw_gradient()
        optimizer.step()
        optimizer.zero_grad()
    steps.close()
    assert steps.completed == 2  # the first two look like micro-batches of one
    del idle


def test_several_optimizers_of_one_model_end_one_step(
    steps: Steps, model: nn.Module
) -> None:
    pair = [torch.optim.SGD([x], lr=0.1) for x in model.used.parameters()]
    for _ in range(2):
        micro_batch(steps, model)
        for optimizer in pair:
            optimizer.step()
    assert micro_batch(steps, model)
    assert steps.completed == 2


def test_an_optimizer_that_steps_during_backward(
    steps: Steps, model: nn.Module
) -> None:
    def step_at_once(parameter: nn.Parameter) -> None:
        own = torch.optim.SGD([parameter], lr=0.1)
        own.step()
        parameter.grad = None

    for parameter in model.used.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    assert [micro_batch(steps, model) for _ in range(3)] == [False, True, True]


def test_a_closure_that_runs_the_model_is_one_step(
    steps: Steps, model: nn.Module
) -> None:
    optimizer = torch.optim.LBFGS(model.used.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        steps.begin()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        steps.saw_gradient()
        return loss

    optimizer.step(closure)
    assert steps.passes_in_step >= 2
    assert steps.completed == 0
    optimizer.step(closure)
    assert steps.completed == 1


def test_a_compiled_optimizer_is_seen(steps: Steps, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        micro_batch(steps, model)
        step()
    assert micro_batch(steps, model)
    assert steps.completed == 2


def test_nothing_is_left_in_torch(model: nn.Module) -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    closed, dropped = Steps(model), Steps(model)
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 2
    closed.close()
    del dropped
    Steps(model).close()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


def test_steps_that_are_given_up_while_an_optimizer_steps_disturb_nobody() -> None:
    """As where garbage is collected inside of a hook."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given_up: list[Steps] = []
    handle = register_optimizer_step_post_hook(lambda *_: given_up.clear())
    given_up.append(Steps(nn.Linear(2, 2)))
    other = Steps(model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    handle.remove()
    before = len(torch_optimizer._global_optimizer_post_hooks)
    other.close()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before - 2
