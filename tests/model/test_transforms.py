"""Whether torch.func is at work: private places of torch that a new version may move."""

from __future__ import annotations

import torch
from torch.func import grad

from fp8tune.model.passes import keeps_graph
from fp8tune.model.transforms import is_wrapped, under_transform


def test_a_transform_is_told_from_none() -> None:
    seen: list[bool] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        seen.extend((under_transform(), is_wrapped(x)))
        return x.sum()

    grad(loss)(torch.ones(2))
    loss(torch.ones(2))
    assert seen == [True, True, False, False]


def test_gradients_in_a_batch_are_told_from_single_ones() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(is_wrapped(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_a_backward_that_keeps_its_graph_is_told_from_one_that_does_not() -> None:
    seen: list[bool] = []
    loss = torch.ones(2, requires_grad=True).sum()
    loss.register_hook(lambda _: seen.append(keeps_graph()))
    loss.backward(retain_graph=True)
    loss.backward()
    assert seen == [True, False]
