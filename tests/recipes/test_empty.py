"""Calls without rows, such as those of an expert that no token chose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8tune.recipes import get_recipe
from fp8tune.recipes.empty import for_any_rows
from tests.helpers import graph_texts, needs_mxfp8

RECIPES = [
    "rowwise",
    "rowwise_with_gw_hp",
    "tensorwise",
    pytest.param("mxfp8_floor", marks=needs_mxfp8),
    "blockwise",
    "bf16",
]
FLOAT8 = RECIPES[:3]


def converted(name: str, *, bias: bool = True) -> nn.Linear:
    dtype = torch.float32 if name == "bf16" else torch.bfloat16
    linear = nn.Linear(128, 128, bias=bias, dtype=dtype)
    for_any_rows(get_recipe(name, "cpu")).convert(linear)
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(0,), (0, 5), (4, 0)])
@pytest.mark.parametrize("name", RECIPES)
def test_no_rows_go_forward_and_backward(
    name: str, rows: tuple[int, ...], *, bias: bool
) -> None:
    linear = converted(name, bias=bias)
    x = torch.zeros(*rows, 128, dtype=linear.weight.dtype, requires_grad=True)
    output = linear(x)
    assert output.shape == (*rows, 128)
    assert output.dtype is x.dtype
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert linear.weight.grad is not None
    assert not linear.weight.grad.any()


@pytest.mark.parametrize("name", RECIPES)
def test_no_rows_under_autocast_have_the_dtype_of_rows(name: str) -> None:
    linear = nn.Linear(128, 128)
    for_any_rows(get_recipe(name, "cpu")).convert(linear)
    with torch.autocast("cpu", torch.bfloat16):
        none, some = (linear(torch.ones(rows, 128)) for rows in (0, 8))
    assert none.dtype is some.dtype


@pytest.mark.parametrize("name", FLOAT8)
def test_rows_in_another_dtype_than_the_weight(name: str) -> None:
    linear = nn.Linear(128, 128)
    for_any_rows(get_recipe(name, "cpu")).convert(linear)
    none, some = (linear(torch.ones(rows, 128).bfloat16()) for rows in (0, 8))
    assert none.dtype is some.dtype


def test_rows_that_only_run_time_knows_stay_in_one_graph() -> None:
    linear = converted("rowwise")

    def run(compile: object) -> None:
        def chosen(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return linear(x[mask.nonzero()[:, 0]])

        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            call = torch.compile(chosen, backend=compile, fullgraph=True)
            call(torch.ones(8, 128).bfloat16(), torch.tensor([1, 0] * 4))

    (text,) = graph_texts(run)
    assert "nn.linear(" not in text
