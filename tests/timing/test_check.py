"""The accuracy of converted layers in a forward: what an outlier does to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import get_recipe
from fp8tune.model.called import Call, signature_of
from fp8tune.model.candidates import Sample
from fp8tune.timing.accuracy import accuracy_of
from fp8tune.timing.check import Checked, check_accuracy
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay
from tests.helpers import TORCHAO_0_17

if TYPE_CHECKING:
    from collections.abc import Callable

M, K, N = 256, 256, 256
BUDGET_BYTES = 2**26

NAMES = ["tensorwise", "rowwise", "rowwise:output", "rowwise_with_gw_hp", "blockwise"]
NAMES += [] if TORCHAO_0_17 else ["mxfp8_rceil"]


def normal() -> torch.Tensor:
    return torch.randn(M, K)


def channels_of_all_sizes() -> torch.Tensor:
    return normal() * torch.randn(K).mul(2).exp()


def tokens_of_all_sizes() -> torch.Tensor:
    return normal() * torch.randn(M, 1).mul(2).exp()


def squared_relu() -> torch.Tensor:
    return channels_of_all_sizes().relu() * normal().relu()


def nearly_all_zeros() -> torch.Tensor:
    return normal() * (torch.rand(M, K) < 0.05)


def padded_tokens() -> torch.Tensor:
    return normal() * (torch.arange(M) < 32)[:, None]


def heavy_tails() -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((M, K))


def outlier_features() -> torch.Tensor:
    """Two channels 60 times as large as the others."""
    return normal() * torch.ones(K).index_fill(0, torch.tensor([3, 70]), 60.0)


ORDINARY = [
    normal,
    channels_of_all_sizes,
    tokens_of_all_sizes,
    squared_relu,
    nearly_all_zeros,
    padded_tokens,
    heavy_tails,
    outlier_features,
]


def outlier_channel(size: float) -> torch.Tensor:
    x = size * torch.randn(M, K)
    x[:, 0] = 1e4
    return x


def found(
    name: str, x: torch.Tensor, weight: torch.Tensor | None = None
) -> tuple[float, float]:
    """(what a check says, the lowest SQNR of output and gradients), in dB."""
    linear, recipe = nn.Linear(K, N, bias=False), get_recipe(name, "cpu")
    if weight is not None:
        linear.weight.data.copy_(weight)
    x = x.requires_grad_()
    signature = signature_of(linear, Call(x), recompute=False)
    recipe.convert(linear)
    layer = Checked("layer", linear, recipe, grad_input=True)
    checked = check_accuracy([layer], lambda: linear(x), BUDGET_BYTES)
    replay = Replay(Operands(Sample(signature, linear, x, None)), recipe, None)
    worst = accuracy_of(replay, BUDGET_BYTES).worst_db
    assert worst is not None
    return checked["layer"], worst


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", ORDINARY)
def test_of_ordinary_numbers_it_is_that_of_the_products(
    name: str, data: Callable[[], torch.Tensor]
) -> None:
    checked, worst = found(name, data())
    assert checked == worst
    assert checked > 22


@pytest.mark.parametrize("name", ["tensorwise", "rowwise", "rowwise:output"])
def test_an_outlier_channel_that_leaves_the_others_no_range_is_seen(name: str) -> None:
    """It is itself nearly all of the products, whose SQNR does not fall."""
    checked, worst = found(name, outlier_channel(0.01))
    assert worst > 24
    assert checked < 1


def test_a_single_outlier_takes_the_range_of_a_whole_tensor_or_of_one_row() -> None:
    x = 0.01 * normal()
    x[3, 5] = 1e4
    checked, worst = found("tensorwise", x)
    assert worst > 24
    assert checked < 1
    checked, worst = found("rowwise", x)
    assert checked > 24


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
def test_beside_an_outlier_of_1e4_numbers_about_1_are_not_lost(name: str) -> None:
    """e4m3 reaches from 448 down to 2**-9; so they are multiplied as exactly as ever."""
    checked, _ = found(name, outlier_channel(1.0))
    assert checked > 24
    weight = torch.randn(N, K).mul_(K**-0.5)
    weight[:, 0] = 0  # so that all of the output is theirs
    _, worst = found(name, outlier_channel(1.0), weight)
    assert worst > 24


def test_outliers_in_the_weight_are_seen_too() -> None:
    weight = 1e-3 * torch.randn(N, K)
    weight[:, 0] = 1e4
    checked, worst = found("tensorwise", normal(), weight)
    assert worst > 20
    assert checked < 1


def test_what_a_recipe_does_not_tell_is_not_judged() -> None:
    checked, worst = found("bf16", outlier_channel(0.01))
    assert checked == worst > 24
