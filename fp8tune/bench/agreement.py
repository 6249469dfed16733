"""Whether the clock tells the truth: CUDA events against torch.profiler.

Both time forward + backward of one Linear behind the same blocker, with caches cold::

    blocker | flush | kernel kernel kernel | flush | kernel kernel kernel | ...
                    ^        span          ^
              start event              end event

The profiler knows the start and the end of each kernel from the GPU itself. Their *sum*
leaves out the time in which the GPU goes from one kernel to the next, which a training
step pays too; their *span*, from the first start to the last end, has it. So the span is
what events are compared with. Behind the blocker it holds no launch gaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fp8tune.cuda_clock import CudaClock
from fp8tune.errors import ConfigError
from fp8tune.recipes import Recipe, get_recipe
from fp8tune.records import Sample, Shape, Signature
from fp8tune.replay import Operands, Replay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Agreement", "clock_agreement", "repetitions"]

# M, K, N; the largest is w1 of Llama3-8B.
_SHAPES = (
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 4096, 4096),
    (8192, 4096, 4096),
    (8192, 4096, 14336),
)
_FLOAT8_SHAPE = (8192, 4096, 4096)
# In turn with and without the profiler, so that the GPU's frequency is the same.
_ROUNDS = 4
_REPEATS = 16
_ATTEMPTS = 10

# Start and end in microseconds.
Interval = tuple[float, float]


@dataclass(frozen=True)
class Agreement:
    """Medians of forward + backward of one Linear, in milliseconds.

    Attributes:
        m: rows.
        k: in_features.
        n: out_features.
        variant: "reference", which is bfloat16, or the name of a recipe.
        event_ms: between the clock's events, without a profiler.
        profiled_event_ms: the same while the profiler ran.
        kernel_ms: sum of the profiler's kernel times.
        span_ms: from the start of the first kernel to the end of the last.
        ratio: event_ms / span_ms.
    """

    m: int
    k: int
    n: int
    variant: str
    event_ms: float
    profiled_event_ms: float
    kernel_ms: float
    span_ms: float
    ratio: float


def clock_agreement(device: torch.device) -> list[Agreement]:
    """Compare the two on Linears of several sizes, and on a float8 one if there are GEMMs.

    Raises:
        ConfigError: not a CUDA or ROCm device.
        RuntimeError: the profiler does not see the kernels that ran.
    """
    if device.type != "cuda":
        raise ConfigError(f"events are compared with kernels on a GPU, not on {device}")
    clock = CudaClock(device)
    return [_compare(clock, work) for work in _works(device)]


def _works(device: torch.device) -> Iterator[Replay]:
    for sizes in _SHAPES:
        yield _work(sizes, None, device)
    rowwise = get_recipe("rowwise", device)
    if not rowwise.emulated:
        yield _work(_FLOAT8_SHAPE, rowwise, device)


def _work(
    sizes: tuple[int, int, int], recipe: Recipe | None, device: torch.device
) -> Replay:
    m, k, n = sizes
    shape = Shape(m, k, n, "bfloat16", "bfloat16", None, bias=False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    linear = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    return Replay(Operands(Sample(signature, linear, None, None)), recipe, None)


def _compare(clock: CudaClock, work: Replay) -> Agreement:
    clock.warm_up([work])
    events: list[float] = []
    profiled: list[float] = []
    kernels: list[list[Interval]] = []
    for _ in range(_ROUNDS):
        events += clock.time_ms([work] * _REPEATS)
        times, intervals = _profile(clock, work)
        profiled += times
        kernels += repetitions(intervals, _REPEATS)
    shape = work.signature.shape
    span_ms = median(x[-1][1] - x[0][0] for x in kernels) / 1e3
    return Agreement(
        shape.m,
        shape.k,
        shape.n,
        work.variant,
        median(events),
        median(profiled),
        median(sum(end - start for start, end in x) for x in kernels) / 1e3,
        span_ms,
        median(events) / span_ms,
    )


def _profile(clock: CudaClock, work: Replay) -> tuple[list[float], list[Interval]]:
    """Times of a batch that was not run again, and everything the GPU ran in it."""
    for _ in range(_ATTEMPTS):
        discarded = clock.discarded
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as profiler:
            times = clock.time_ms([work] * _REPEATS)
        if clock.discarded == discarded:
            break
    else:
        raise RuntimeError(f"the GPU waited for the CPU in {_ATTEMPTS} profiles")
    found = [
        (x.time_range.start, x.time_range.end)
        for x in profiler.events() or ()
        if x.device_type.name == "CUDA" and not x.is_user_annotation
    ]
    return times, sorted(found)


def repetitions(intervals: Sequence[Interval], repeats: int) -> list[list[Interval]]:
    """The kernels of each repetition: after one blocker, each begins with one flush.

    Args:
        intervals: of everything that the GPU ran, in order.
        repeats: how many repetitions of the same work there were.

    Raises:
        RuntimeError: there are not equally many kernels for each.
    """
    each, rest = divmod(len(intervals) - 1, repeats)
    if rest or each < 2:
        raise RuntimeError(
            f"the profiler saw {len(intervals)} kernels: no blocker followed by "
            f"{repeats} times a flush and the same kernels"
        )
    return [list(intervals[i + 1 : i + each]) for i in range(1, len(intervals), each)]
