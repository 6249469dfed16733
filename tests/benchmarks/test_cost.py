"""What tuning itself costs. Run by `make bench`; figures are in docs/measurements/."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, TuneConfig, get_recipe
from fp8tune.bench.cost import tuning_cost
from fp8tune.decision.records import Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.measure import measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_benchmark.fixture import BenchmarkFixture

    from fp8tune.timing.clock import Work

SHAPES = [(16 * k, 16 * n) for k in (1, 2) for n in (1, 2, 3, 4)]


class OneMillisecond:
    """A clock that runs nothing, so that only fp8tune's own work is left."""

    def __init__(self) -> None:
        self.signatures: set[Signature] = set()

    def warm_up(self, work: Sequence[Work]) -> None:
        self.signatures.update(item.signature for item in work)

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        return [1.0 if item.variant == "reference" else 0.5 for item in work]

    def now(self) -> float:
        return 0.0


class Many(nn.Module):
    """10,000 Linears of 8 shapes, each called once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(*SHAPES[i % len(SHAPES)], bias=False) for i in range(10_000)
        )

    def forward(self, rows: int) -> torch.Tensor:
        outputs = [layer(torch.ones(rows, layer.in_features)) for layer in self.layers]
        return torch.stack([x.sum() for x in outputs]).sum()


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare module", "wrapper"])
def test_frozen_forward(benchmark: BenchmarkFixture, *, wrapped: bool) -> None:
    module = Nothing()
    auto = AutoFloat8(module, recipe="bf16", clock=OneMillisecond())
    auto.freeze()
    x = torch.ones(1)
    benchmark(auto if wrapped else module, x)


def test_the_frozen_wrapper_adds_at_most_10_us() -> None:
    module = Nothing()
    auto = AutoFloat8(module, recipe="bf16", clock=OneMillisecond())
    auto.freeze()
    x = torch.ones(1)

    def microseconds(call: nn.Module) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            call(x)
        return (time.perf_counter() - start) * 1e3

    added = sorted(microseconds(auto) - microseconds(module) for _ in range(21))
    assert added[10] < 10


def test_ten_thousand_linears(benchmark: BenchmarkFixture) -> None:
    """Screen and convert in the constructor; measure, decide and record at the freeze."""
    model, clock = Many(), OneMillisecond()

    start = time.perf_counter()
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=1, clock=clock)
    constructed = time.perf_counter() - start
    auto(4).backward()
    benchmark.pedantic(auto.freeze, rounds=1)
    frozen = benchmark.stats.stats.total
    benchmark.extra_info["constructor_s"] = constructed
    assert constructed + frozen < 2
    assert len(clock.signatures) == len(SHAPES)
    assert len(auto.plan.converted_fqns) == 10_000


@pytest.mark.parametrize("rows", [8, 64, 1024])
def test_measuring_one_signature(benchmark: BenchmarkFixture, rows: int) -> None:
    """Stops within max_seconds = 1 even where no difference is clear."""
    shape = Shape(rows, 512, 512, "float32", "float32", None, bias=False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    sample = Sample(signature, nn.Linear(512, 512, bias=False), None, None)
    recipe, clock = get_recipe("bf16", "cpu"), CpuClock()
    # A confidence that no interval reaches keeps the sampling going.
    config = TuneConfig(confidence=1 - 1e-12, max_samples=100_000)
    start = time.perf_counter()
    benchmark.pedantic(measure, (sample, recipe, clock, config), rounds=1)
    assert time.perf_counter() - start < 1.5


def test_a_cold_and_a_warm_compile_cache(benchmark: BenchmarkFixture) -> None:
    arguments = ("torchtitan-debug", "bf16", torch.device("cpu"))
    cost = benchmark.pedantic(tuning_cost, arguments, rounds=1)
    assert cost["warm"]["warm_up_s"] < cost["cold"]["warm_up_s"]
    assert cost["cold"]["warm_up_s"] <= cost["cold"]["tuning_s"]
