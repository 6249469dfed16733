"""torchao's table for H100, every other M held out: interpolating must not mislead."""

from __future__ import annotations

import random

import pytest

from fp8tune.config import TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import REFERENCE, Layer, Measurement, Signature
from fp8tune.model.candidates import Sample
from fp8tune.recipes import get_recipe
from fp8tune.timing.measure import measure
from tests.decision.test_published_table import cells, meta_linear
from tests.helpers import signature

CONFIG = TuneConfig()
ROWWISE = get_recipe("rowwise", "cpu")
TABLE = {(m, k, n): speedup for m, k, n, speedup in cells()}
SIZES = sorted({m for m, _, _ in TABLE})
SHAPES = sorted({(k, n) for _, k, n in TABLE})
CLEAR = (Reason.FASTER, Reason.SLOWER)


def timed(called: Signature, noise: float, clock: type) -> Measurement:
    """A cell of the table on a noisy machine."""
    shape = called.shape
    speedup = TABLE[shape.m, shape.k, shape.n]
    rng = random.Random(f"{shape.m} {shape.k} {shape.n}")  # noqa: S311

    def time_ms(_: Signature, variant: str) -> float:
        exact = shape.m / 1024 / (1.0 if variant == REFERENCE else speedup)
        return exact * (1 + rng.gauss(0, noise))

    sample = Sample(called, meta_linear(shape.k, shape.n), None, None)
    return measure(sample, ROWWISE, clock(time_ms), CONFIG)


def verdict(called: Signature, known: list[Measurement]) -> Reason:
    shape = called.shape
    calls = ((called, 1),)
    layer = Layer("a", shape.k, shape.n, "bfloat16", True, None, calls)
    (decision,) = decide([layer], known, [ROWWISE.name], CONFIG)
    return decision.reason


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_every_other_m_agrees_with_timing_it(
    scripted_clock: type, noise: float
) -> None:
    clear = agreed = 0
    for k, n in SHAPES:
        every = [timed(signature(m, k, n), noise, scripted_clock) for m in SIZES]
        for first in (0, 1):
            for alone in every[1 - first :: 2]:
                expected = verdict(alone.signature, [alone])
                found = verdict(alone.signature, every[first::2])
                # The table has two digits: 1.01 and 0.99 are no clear cases.
                near_one = abs(TABLE[alone.signature.shape.m, k, n] - 1) <= 0.02
                if expected in CLEAR and not near_one:
                    clear += 1
                    agreed += found is expected
                    assert found in (expected, Reason.NO_CLEAR_DIFFERENCE)
    assert clear >= 200
    assert agreed / clear >= 0.95
