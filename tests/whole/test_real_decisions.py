"""Decisions with real clocks, where bf16 GEMMs have a real crossover on this CPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, Reason, TuneConfig
from tests.helpers import has_fast_bf16

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not has_fast_bf16(), reason="the crossover was measured on a CPU with AMX"
    ),
]


class TwoKinds(nn.Module):
    """One layer that sees every row, one of the same weight that sees eight."""

    def __init__(self) -> None:
        super().__init__()
        self.every_row = nn.Linear(512, 512)
        self.eight_rows = nn.Linear(512, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.eight_rows(self.every_row(x)[:8])


def tune(model: nn.Module, rows: int, **options: object) -> AutoFloat8:
    # Long enough to outlast what else may run on the machine.
    config = TuneConfig(max_seconds=5.0, max_samples=512, trial_steps=0)
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=1, config=config, **options)
    for _ in range(2):
        x = torch.randn(rows, 512, requires_grad=True)
        auto(x).square().mean().backward()
    assert auto.frozen
    return auto


@pytest.mark.parametrize("compile", [False, True])
def test_the_same_weight_shape_is_decided_by_its_number_of_rows(
    *, compile: bool
) -> None:
    few = tune(nn.Linear(512, 512), 8, compile=compile).plan[""]
    many = tune(nn.Linear(512, 512), 1024, compile=compile).plan[""]
    assert (few.verdict, few.reason) == ("reference", Reason.SLOWER)
    assert (many.verdict, many.reason) == ("converted", Reason.FASTER)


def test_a_model_with_both_kinds_of_layer_gets_both_verdicts() -> None:
    auto = tune(TwoKinds(), 1024)
    assert auto.plan.converted_fqns == ["every_row"]
    assert auto.plan.reference_fqns == ["eight_rows"]
    assert type(auto.module.eight_rows) is nn.Linear
    assert auto.plan["eight_rows"].reason is Reason.SLOWER


class Experts(nn.Module):
    """One grouped GEMM of equal shares of the rows."""

    def __init__(self, experts: int, k: int, n: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, n, k) / k**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = len(x) // len(self.w1)
        offs = torch.arange(share, len(x) + 1, share, dtype=torch.int32)
        return F.grouped_mm(x, self.w1.mT, offs=offs)


class TwoKindsOfExperts(nn.Module):
    """Four that get 256 rows each, and 64 that get two."""

    def __init__(self) -> None:
        super().__init__()
        self.few = Experts(4, 512, 1376)
        self.many = Experts(64, 512, 384)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.few(x).mean() + self.many(x[:128]).mean()


def test_experts_get_both_verdicts() -> None:
    auto = tune(TwoKindsOfExperts(), 1024)
    assert auto.plan.converted_fqns == ["few.w1"]
    assert auto.plan.reference_fqns == ["many.w1"]
    assert auto.plan["many.w1"].reason is Reason.SLOWER


def test_emulated_float8_is_reverted_and_said_to_be_emulated() -> None:
    model = nn.Sequential(nn.Linear(4096, 2304))
    auto = AutoFloat8(model, recipe="rowwise", warmup_steps=1)
    for _ in range(2):
        auto(torch.randn(64, 4096)).sum().backward()
    assert auto.plan.converted_fqns == []
    assert "emulated" in str(auto.plan)
