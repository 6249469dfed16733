"""What surrounds a Linear while it is timed, and what compiling took."""

from __future__ import annotations

import gc
import logging
import types
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, TuneConfig, get_recipe
from fp8tune.config import Context
from fp8tune.decision.records import Shape, Signature
from fp8tune.model.candidates import Sample
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.measure import measure
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay
from tests.helpers import all_faster

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fp8tune.timing.clock import Work

BF16 = get_recipe("bf16", "cpu")


def sample() -> Sample:
    torch.manual_seed(0)
    shape = Shape(8, 16, 24, "float32", "float32", None, bias=False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    linear = nn.Linear(16, 24, bias=False)
    return Sample(signature, linear, torch.randn(8, 16), torch.randn(8, 24))


@pytest.mark.parametrize("recipe", [None, BF16])
def test_norm_act_times_a_norm_before_and_an_activation_behind(recipe: object) -> None:
    taken = sample()
    replay = Replay(Operands(taken), recipe, None, Context.NORM_ACT)
    x = taken.input.clone().requires_grad_()
    linear = nn.Linear(16, 24, bias=False)
    linear.weight = taken.linear.weight
    if recipe:
        recipe.convert(linear)
    expected = F.silu(linear(F.rms_norm(x, (16,))))
    grads = torch.autograd.grad(expected, [x, linear.weight], taken.grad_output)
    output, found = replay._run(replay._forward)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, found, grads))


def test_accuracy_is_that_of_the_bare_linear() -> None:
    taken = sample()
    bare = Replay(Operands(taken), BF16, None).results()
    around = Replay(Operands(taken), BF16, None, Context.NORM_ACT).results()
    assert all(map(torch.equal, bare, around))


def train(auto: AutoFloat8) -> AutoFloat8:
    for _ in range(2):
        auto(torch.ones(16, 32)).sum().backward()
    return auto


def test_the_table_says_it_and_timings_of_the_two_do_not_mix(
    scripted_clock: type, tmp_path: Path
) -> None:
    def timed(context: str) -> int:
        clock = scripted_clock(all_faster)
        auto = AutoFloat8(
            nn.Sequential(nn.Linear(32, 32)),
            recipe="bf16",
            warmup_steps=1,
            cache=tmp_path / "cache.json",
            config=TuneConfig(context=context),
            clock=clock,
        )
        text = str(train(auto).plan)
        assert ("timed eager, norm_act against" in text) == (context == "norm_act")
        return clock.timed.total()

    assert timed("linear") > 0
    assert timed("norm_act") > 0
    assert timed("linear") == timed("norm_act") == 0


def test_what_compiling_took_is_said_apart(
    scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    class SlowToWarmUp(scripted_clock):
        def warm_up(self, work: Sequence[Work]) -> None:
            self._seconds += 3.0 * len(work)

    caplog.set_level(logging.INFO, "fp8tune")
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 48))
    clock = SlowToWarmUp(all_faster)
    train(AutoFloat8(model, recipe="bf16", warmup_steps=1, clock=clock))
    assert (
        "timed 2 signatures in 12.0 s, of which 12.0 s went into compiling and warming up"
        in caplog.messages
    )


@pytest.mark.parametrize("context", Context)
def test_a_compiled_signature_leaves_nothing_behind(context: Context) -> None:
    taken = sample()
    operand = weakref.ref(taken.input)
    config = TuneConfig(context=context, max_samples=8)
    options = {"backend": "eager"}
    found = measure(taken, BF16, CpuClock(), config, options)
    assert found.candidate_ms
    del taken
    gc.collect()
    functions = [x for x in gc.get_objects() if type(x) is types.FunctionType]
    assert not any(x.__name__.startswith("fp8tune_m") for x in functions)
    assert operand() is None
