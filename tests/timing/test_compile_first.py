"""What is compiled before the timing is not compiled again, and all of it comes first."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, TuneConfig, get_recipe
from fp8tune.decision.records import REFERENCE, Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.timing.compile_first import compile_variants
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.gemms import measure_with_parts
from fp8tune.timing.measure import measure_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp8tune.timing.clock import Work
    from fp8tune.timing.replay import CompiledBodies
    from tests.conftest import Ranks, ScriptedClock, WorkingClock

BF16 = get_recipe("bf16", "cpu")
ROWWISE = get_recipe("rowwise", "cpu")
CONFIG = TuneConfig(max_samples=8, trial_steps=0)
SIGNATURE = Signature(
    Shape(32, 64, 48, "float32", "float32", None, bias=False),
    grad_input=True,
    grad_weight=True,
    grad_bias=False,
)


def take() -> Sample:
    """The same signature with other tensors and another layer, as when it is timed."""
    linear = nn.Linear(64, 48, bias=False)
    return Sample(SIGNATURE, linear, torch.randn(32, 64), torch.randn(32, 48))


class Counting:
    """A backend that compiles nothing and counts what it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]
    ) -> Callable[..., object]:
        del inputs
        self.graphs += 1
        return graph.forward


def test_what_was_compiled_first_is_timed_without_another_trace(
    working_clock: type[WorkingClock],
) -> None:
    backend, clock = Counting(), working_clock(lambda *_: 1.0)
    compiled: CompiledBodies = {}
    options = {"backend": backend}
    compile_variants(take, [BF16], clock, CONFIG, options, compiled=compiled)
    assert backend.graphs == 2
    (found,) = measure_all(take, [BF16], clock, CONFIG, options, compiled=compiled)
    assert len(found.ratios) == 8
    assert found.accuracy
    assert backend.graphs == 2
    assert set(compiled) == {(SIGNATURE, REFERENCE), (SIGNATURE, "bf16")}


def test_each_is_run_once(working_clock: type[WorkingClock]) -> None:
    calls: list[str] = []

    class Clock(working_clock):
        def warm_up(self, work: Sequence[Work]) -> None:
            for item in work * 3:
                started = len(seen)
                item()
                calls.append(item.variant if len(seen) > started else "nothing")

    seen: list[object] = []
    options = {"backend": lambda graph, _: lambda *x: (seen.append(0), graph(*x))[1]}
    clock = Clock(lambda *_: 1.0)
    compile_variants(take, [BF16], clock, CONFIG, options, compiled={})
    nothing = ["nothing"] * 2
    assert calls == [REFERENCE, *nothing, "bf16", *nothing]


def test_the_reference_is_compiled_once_for_all_parts_of_a_recipe(
    working_clock: type[WorkingClock],
) -> None:
    backend = Counting()
    clock = working_clock(lambda _, variant: 0.8 if variant == REFERENCE else 1.0)
    found = measure_with_parts(take, [ROWWISE], clock, CONFIG, {"backend": backend})
    assert found[0].recipe == "rowwise"
    timed = {variant for _, variant in clock.timed}
    assert len(timed) == 5  # the reference, the whole recipe and each GEMM alone
    assert backend.graphs == len(timed)


def test_what_cannot_be_compiled_is_said_by_the_timing_alone(
    working_clock: type[WorkingClock], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        name, reference, settings, emulated = "broken", "float32", "", False

        def convert(self, linear: nn.Linear) -> None:
            raise RuntimeError("no such kernel")

    caplog.set_level(logging.INFO, "fp8tune")
    compiled: CompiledBodies = {}
    clock = working_clock(lambda *_: 1.0)
    recipes = [Broken(), BF16]
    options = {"backend": Counting()}
    compile_variants(take, recipes, clock, CONFIG, options, compiled=compiled)
    assert not [x for x in caplog.records if x.name == "fp8tune"]
    broken, whole = measure_all(
        take, recipes, clock, CONFIG, options, compiled=compiled
    )
    assert broken.detail == "RuntimeError: no such kernel"
    assert len(whole.ratios) == 8


def test_a_scripted_clock_compiles_nothing(
    scripted_clock: type[ScriptedClock],
) -> None:
    backend, clock = Counting(), scripted_clock(lambda *_: 1.0)
    options = {"backend": backend}
    compile_variants(take, [BF16], clock, CONFIG, options, compiled={})
    assert backend.graphs == 0


class _NotingClock(CpuClock):
    def __init__(self) -> None:
        super().__init__()
        self.began: list[float] = []

    def time_ms(self, work: Sequence[Work]) -> list[float]:
        self.began.append(time.time())
        return super().time_ms(work)


def when_compiled_and_timed() -> tuple[list[float], list[float]]:
    compiled: list[float] = []

    @torch._dynamo.register_backend(name="noting")
    def noting(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        del inputs
        time.sleep(0.1)
        compiled.append(time.time())
        return graph.forward

    del noting
    clock = _NotingClock()
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    auto = AutoFloat8(
        model,
        "bf16",
        warmup_steps=1,
        compile={"backend": "noting"},
        config=CONFIG,
        clock=clock,
    )
    auto(torch.randn(32, 64)).square().mean().backward()
    auto.freeze()
    return compiled, clock.began


@pytest.mark.dist
def test_no_rank_times_while_another_compiles(ranks: Ranks) -> None:
    answers = ranks(2, when_compiled_and_timed)
    compiled, began = zip(*answers.values(), strict=True)
    assert all(len(x) == 4 for x in compiled)  # two variants of two signatures
    assert max(map(max, compiled)) < min(map(min, began))
