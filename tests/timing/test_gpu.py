"""The clock against an independent instrument; needs a GPU, apart from the arithmetic."""

import dataclasses
import json

import pytest
import torch

from fp8tune.bench.agreement import Kernel, clock_agreement, repetitions
from fp8tune.errors import ConfigError

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"
)


BLOCKER = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def kernels(*spans, name="gemm"):
    return [Kernel(float(start), float(end), name) for start, end in spans]


def batch(at):
    """A blocker, then twice a flush and two kernels."""
    spans = ((9, 10), (10, 12), (13, 15), (15, 17), (17, 19), (20, 23))
    work = [(at + start, at + end) for start, end in spans]
    return kernels((at, at + 9), name=BLOCKER) + kernels(*work)


def test_blocker_and_flushes_are_told_from_the_kernels():
    found = repetitions(batch(0), 2)
    assert found == [[(10.0, 12.0), (13.0, 15.0)], [(17.0, 19.0), (20.0, 23.0)]]


def test_what_the_clock_threw_away_does_not_count():
    thrown_away = batch(0)[:4]
    assert repetitions([*thrown_away, *batch(100)], 2) == repetitions(batch(100), 2)


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_without_a_blocker_nothing_can_be_told_apart(number):
    spans = [(float(i), i + 1.0) for i in range(number)]
    with pytest.raises(RuntimeError, match=f"saw {number} kernels, 0 of them blockers"):
        repetitions(kernels(*spans), 2)


@pytest.mark.parametrize("number", [0, 2, 5])
def test_kernels_that_are_not_equally_many_are_an_error(number):
    with pytest.raises(
        RuntimeError, match="1 of them blockers: no blocker followed by"
    ):
        repetitions(batch(0)[: 1 + number], 2)


def test_events_are_compared_on_a_gpu_only():
    with pytest.raises(ConfigError, match="on a GPU, not on cpu"):
        next(clock_agreement(torch.device("cpu")))


@pytest.mark.gpu
@needs_gpu
def test_events_agree_with_the_profilers_kernel_times():
    records = list(clock_agreement(torch.device("cuda")))
    print(json.dumps([dataclasses.asdict(x) for x in records], indent=1))  # noqa: T201
    assert len(records) >= 5
    for x in records:
        tolerance = 0.03 if x.m * x.k * x.n >= 2048 * 4096 * 4096 else 0.10
        assert x.ratio == pytest.approx(1, abs=tolerance), x
