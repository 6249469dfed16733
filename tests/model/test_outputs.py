"""A pass waits for its backward, whatever its forward returned the tensors in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fp8tune.model.outputs import tensors_in
from fp8tune.model.passes import Passes


@dataclass
class Output:
    loss: Any


class Own:
    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.again = self
        self.model = nn.Linear(2, 2)


def in_dict(loss: object) -> object:
    return {"a": [loss]}


def deep(loss: object) -> object:
    return Own([Output(loss)]), 1


@pytest.mark.parametrize(
    "wrap",
    [in_dict, Output, Own, deep],
)
def test_a_pass_waits_for_the_tensors_in_its_output(wrap: Any) -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    passes = Passes()
    output = wrap(loss)
    assert list(tensors_in(output)) == [loss]
    passes.ended(output)
    assert passes.waiting == 1
    loss.backward()
    assert passes.waiting == 0


class Slotted:
    __slots__ = ("__secret", "loss")

    def __init__(self, loss: Any) -> None:
        self.loss = 1
        self.__secret = loss


class OneSlot:
    __slots__ = "loss"  # noqa: PLC0205

    def __init__(self, loss: Any) -> None:
        self.loss = loss


@pytest.mark.parametrize("wrap", [Slotted, OneSlot])
def test_slots_are_looked_into(wrap: Any) -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    assert list(tensors_in(wrap(loss))) == [loss]


def test_an_output_that_nobody_can_see_into_waits_for_some_gradient() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    passes = Passes()
    passes.ended(lambda: loss)
    assert passes.opaque
    assert passes.waiting == 1
    passes.saw_backward()
    assert passes.waiting == 0
    passes.ended(loss)
    assert not passes.opaque


def test_an_output_without_gradients_waits_for_nothing() -> None:
    passes = Passes()
    passes.ended(torch.ones(2))
    assert not passes.opaque
    assert passes.waiting == 0


def test_a_retained_graph_waits_as_long_as_it_lives() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    passes = Passes()
    passes.ended(loss)
    loss.backward(retain_graph=True)
    assert (passes.waiting, passes.retained) == (0, 1)
    loss.backward()
    assert passes.retained == 0
    loss = torch.ones(2, requires_grad=True).sum()
    passes.ended(loss)
    loss.backward(retain_graph=True)
    del loss
    assert passes.retained == 0
