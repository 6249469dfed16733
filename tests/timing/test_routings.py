"""Grouped GEMMs are timed with several of the routings that training had."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fp8tune import AutoFloat8, Reason, TuneConfig
from fp8tune.decision.records import REFERENCE, Signature
from fp8tune.model.candidates import Sample
from fp8tune.model.experts import stand_in
from fp8tune.recipes import get_recipe
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay
from tests.conftest import ScriptedClock
from tests.helpers import signature

E, K, N, T = 4, 16, 32, 24

EVEN, OTHER, SKEWED = (6, 12, 18, T), (5, 11, 17, T), (0, 0, 0, T)


class Model(nn.Module):
    """One grouped GEMM; each step has the next of the routings."""

    def __init__(self, routings):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(E, N, K) / 4)
        self.routings = [torch.tensor(x, dtype=torch.int32) for x in routings]
        self.calls = 0

    def forward(self, x):
        offs = self.routings[self.calls % len(self.routings)]
        self.calls += 1
        return F.grouped_mm(x, self.up.mT, offs=offs)


class Seen(TorchFunctionMode):
    """The routings, and dtypes, of all grouped GEMMs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch._grouped_mm:
            self.calls.append((tuple(kwargs["offs"].tolist()), args[0].dtype))
        return func(*args, **kwargs)


class RoutingClock(ScriptedClock):
    """Runs what it times, and answers by the routing that it ran with."""

    def __init__(self, script):
        super().__init__(lambda *_: 1.0)
        self.by_routing = script
        self.seen = set()

    def time_ms(self, work):
        super().time_ms(work)
        return [self._one(x) for x in work]

    def _one(self, item):
        with Seen() as seen:
            item()
        ((offs, dtype),) = seen.calls
        assert (dtype is torch.bfloat16) == (item.variant != REFERENCE)
        self.seen.add((item.variant, offs))
        return self.by_routing(offs, item.variant)


def loses_if_skewed(offs, variant):
    return 1.0 if variant == REFERENCE else (3.0 if offs == SKEWED else 0.6)


def tuned(routings, clock, steps=3):
    module = Model(routings)
    auto = AutoFloat8(module, "bf16", warmup_steps=steps, clock=clock)
    for _ in range(steps + 1):
        auto(torch.randn(T, K)).square().mean().backward()
    return auto


def test_each_routing_of_warmup_is_timed_with_each_variant():
    clock = RoutingClock(loses_if_skewed)
    tuned([EVEN, OTHER, SKEWED], clock)
    expected = {(x, y) for x in (REFERENCE, "bf16") for y in (EVEN, OTHER, SKEWED)}
    assert clock.seen == expected


@pytest.mark.parametrize(
    ("routings", "reason", "candidate_ms"),
    [
        ([EVEN, OTHER], Reason.FASTER, 0.6),
        ([EVEN, OTHER, SKEWED], Reason.SLOWER, 1.4),
        ([SKEWED], Reason.SLOWER, 3.0),
    ],
)
def test_the_verdict_is_of_all_of_them(routings, reason, candidate_ms):
    decision = tuned(routings, RoutingClock(loses_if_skewed)).plan["up"]
    assert decision.reason is reason
    assert decision.reference_ms == pytest.approx(1.0)
    assert decision.candidate_ms == pytest.approx(candidate_ms)


def test_at_most_four_are_timed_the_first_and_the_last():
    routings = [(i, 12, 18, T) for i in range(8)]
    clock = RoutingClock(loses_if_skewed)
    tuned(routings, clock, steps=7)
    assert sorted({offs[0] for _, offs in clock.seen}) == [0, 4, 5, 6]


def test_equal_routings_are_timed_once():
    clock = RoutingClock(loses_if_skewed)
    measured = tuned([EVEN], clock).tuner._pipeline.run.measurements[0]
    assert set(clock.timed.values()) == {len(measured.reference_ms)}


def sample(routings):
    shape = replace(signature(T, K, N).shape, experts=E)
    weight = nn.Parameter(torch.randn(E, N, K, dtype=torch.bfloat16))
    given = tuple(torch.tensor(x, dtype=torch.int32) for x in routings)
    gemm = stand_in(weight, transposed=False)
    key = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    return Sample(key, gemm, None, None, routings=given)


def test_all_routings_run_the_same_compiled_code():
    counter = CompileCounter()
    operands = Operands(sample([EVEN, OTHER, SKEWED]))
    replay = Replay(operands, None, {"backend": counter})
    assert len(replay.works) == 3
    for work in [*replay.works, *replay.works]:
        work()
    assert counter.frame_count == 1


def test_accuracy_is_of_the_routing_that_the_tensors_had():
    operands = Operands(sample([EVEN, SKEWED]))
    replay = Replay(operands, None, None)
    replay.works[1]()
    with Seen() as seen:
        replay.results()
    assert [offs for offs, _ in seen.calls] == [EVEN]


def test_without_any_each_expert_has_as_many_rows():
    (routing,) = Operands(sample([])).routings
    assert routing.tolist() == [6, 12, 18, 24]


def test_linears_have_none():
    linear = nn.Linear(K, N, bias=False).bfloat16()
    operands = Operands(Sample(signature(T, K, N), linear, None, None))
    replay = Replay(operands, get_recipe("bf16", "cpu"), None)
    assert operands.routings == []
    assert replay.works == [replay]


@pytest.mark.usefixtures("one_thread")
def test_shares_of_the_cpu_are_of_all_routings():
    """As many as times, though each was timed with two."""
    config = TuneConfig(max_samples=16)
    auto = AutoFloat8(Model([EVEN, SKEWED]), "bf16", warmup_steps=2, config=config)
    for _ in range(3):
        auto(torch.randn(T, K)).square().mean().backward()
    (measured,) = auto.tuner._pipeline.run.measurements
    assert measured.load is not None
    assert len(measured.load.cpu_shares) == len(measured.reference_ms)
