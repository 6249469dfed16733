"""The clock against an independent instrument; needs a GPU, apart from the arithmetic."""

import dataclasses
import json

import pytest
import torch

from fp8tune.bench.agreement import clock_agreement, repetitions
from fp8tune.errors import ConfigError

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"
)


def test_blocker_and_flushes_are_told_from_the_kernels():
    blocker, flush = (0.0, 9.0), (9.0, 10.0)
    first = [(10.0, 12.0), (13.0, 15.0)]
    second = [(17.0, 19.0), (20.0, 23.0)]
    everything = [blocker, flush, *first, (15.0, 17.0), *second]
    assert repetitions(everything, 2) == [first, second]


@pytest.mark.parametrize("number", [0, 1, 3, 6])
def test_kernels_that_cannot_be_told_apart_are_an_error(number):
    intervals = [(float(i), i + 1.0) for i in range(number)]
    with pytest.raises(RuntimeError, match=f"the profiler saw {number} kernels"):
        repetitions(intervals, 2)


def test_events_are_compared_on_a_gpu_only():
    with pytest.raises(ConfigError, match="on a GPU, not on cpu"):
        clock_agreement(torch.device("cpu"))


@pytest.mark.gpu
@needs_gpu
def test_events_agree_with_the_profilers_kernel_times():
    records = clock_agreement(torch.device("cuda"))
    print(json.dumps([dataclasses.asdict(x) for x in records], indent=1))  # noqa: T201
    assert len(records) >= 5
    for x in records:
        tolerance = 0.03 if x.m * x.k * x.n >= 2048 * 4096 * 4096 else 0.10
        assert x.ratio == pytest.approx(1, abs=tolerance), x
