"""The accuracy of a layer that FSDP2 shards is that of the whole layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fp8tune import AutoFloat8, TuneConfig

if TYPE_CHECKING:
    from tests.conftest import Ranks

pytestmark = pytest.mark.dist

CONFIG = TuneConfig(static_filter="divisible")


def model() -> nn.Sequential:
    """Rows of the weight differ by far, so that any other weight is told apart."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=False)
    with torch.no_grad():
        linear.weight *= torch.logspace(-3, 1, 96)[:, None] * torch.rand(96, 64) ** 8
    return nn.Sequential(nn.Sequential(linear))


def accuracy(module: nn.Module, dtype: torch.dtype) -> tuple[float | None, ...]:
    """The lowest SQNR, and the shares that are flushed and beyond the range."""
    from tests.conftest import WorkingClock  # noqa: PLC0415 - in the rank's process

    clock = WorkingClock(lambda _, variant: 2.0 if variant == "reference" else 1.0)
    auto = AutoFloat8(module, recipe="tensorwise", config=CONFIG, clock=clock)
    torch.manual_seed(1)
    x = torch.randn(48, 64, dtype=dtype)
    while not auto.frozen:
        auto(x).square().mean().backward()
    (decision,) = auto.plan.decisions
    (found,) = decision.variants
    return found.sqnr_db, found.underflow, found.saturation


def of_shards(name: str) -> object:
    dtype = getattr(torch, name)
    module = model()
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    # By itself, so that its weight is in pieces again by the time it is timed.
    fully_shard(module[0], mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    return accuracy(module, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sqnr_of_a_sharded_layer_is_that_of_the_whole_one(
    dtype: str, ranks: Ranks
) -> None:
    """Three ranks hold 32 of the 96 rows each."""
    kind = getattr(torch, dtype)
    whole = accuracy(model().to(kind), kind)
    assert None not in whole
    assert list(ranks(3, of_shards, dtype).values()) == [whole] * 3
