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
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fp8tune.decision.records import Shape, Signature
from fp8tune.errors import ConfigError
from fp8tune.model.candidates import Sample
from fp8tune.recipes.registry import get_recipe
from fp8tune.timing.cuda_clock import CudaClock
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8tune.recipes.recipe import Recipe

__all__ = ["Agreement", "Kernel", "clock_agreement", "queue_depth", "repetitions"]

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
# Four repeats of a rowwise forward + backward, about 130 launches each, fit into the
# driver's queue of 1,024.
_ROUNDS = 12
_REPEATS = 4
_ATTEMPTS = 10
# Far longer than launching as much as any queue holds.
_QUEUE_BLOCK_MS = 200.0
# The kernel behind torch.cuda._sleep.
_BLOCKER = "spin_kernel"

# Start and end in microseconds.
Interval = tuple[float, float]


class Kernel(NamedTuple):
    """What the profiler saw the GPU run, or copy, or fill; times in microseconds."""

    start: float
    end: float
    name: str


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
        kernels: launches of one forward + backward.
        discarded: batches that the clock threw away so far.
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
    kernels: int
    discarded: int


def clock_agreement(device: torch.device) -> Iterator[Agreement]:
    """Compare the two on Linears of several sizes, and on a float8 one if there are GEMMs.

    Yields:
        One after the other, so that an error keeps those that were made before.

    Raises:
        ConfigError: not a CUDA or ROCm device.
        RuntimeError: the profiler does not see the kernels that ran.
    """
    if device.type != "cuda":
        raise ConfigError(f"events are compared with kernels on a GPU, not on {device}")
    clock = CudaClock(device)
    for work in _works(device):
        yield _compare(clock, work)


def queue_depth(device: torch.device, most: int = 8192) -> int:
    """How many launches the driver takes before the CPU waits for the GPU.

    The GPU is kept busy for long; the launch that takes far longer than those before it
    met a full queue.

    Args:
        device: a CUDA or ROCm device.
        most: launches that are tried.

    Returns:
        The launches before that one, or ``most``.
    """
    clock = CudaClock(device)
    with torch.cuda.device(device):
        cell = torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
        clock.block(_QUEUE_BLOCK_MS)
        try:
            for number in range(most):
                started = clock.now()
                cell.zero_()
                if (clock.now() - started) * 1e3 > _QUEUE_BLOCK_MS / 10:
                    return number
        finally:
            torch.cuda.synchronize(device)
    return most


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
        times, seen = _profile(clock, work)
        profiled += times
        kernels += repetitions(seen, _REPEATS)
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
        len(kernels[0]),
        clock.discarded,
    )


def _profile(clock: CudaClock, work: Replay) -> tuple[list[float], list[Kernel]]:
    """Times of a batch without gaps, and everything the GPU ran around it."""
    for _ in range(_ATTEMPTS):
        with_gaps = clock.with_gaps
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities, acc_events=True) as profiler:
            times = clock.time_ms([work] * _REPEATS)
        if clock.with_gaps == with_gaps:
            break
    else:
        raise RuntimeError(f"the GPU waited for the CPU in {_ATTEMPTS} profiles")
    found = [
        Kernel(x.time_range.start, x.time_range.end, x.name)
        for x in profiler.events() or ()
        if x.device_type.name == "CUDA" and not x.is_user_annotation
    ]
    return times, sorted(found)


def repetitions(kernels: Sequence[Kernel], repeats: int) -> list[list[Interval]]:
    """The kernels of each repetition behind the last blocker; each begins with one flush.

    What ran before the last blocker belongs to batches that the clock threw away.

    Args:
        kernels: everything that the GPU ran, in order.
        repeats: how many repetitions of the same work there were.

    Raises:
        RuntimeError: there is no blocker, or not equally many kernels for each.
    """
    blockers = [i for i, x in enumerate(kernels) if _BLOCKER in x.name]
    behind = kernels[blockers[-1] + 1 :] if blockers else ()
    each, rest = divmod(len(behind), repeats)
    if rest or each < 2:
        raise RuntimeError(
            f"the profiler saw {len(kernels)} kernels, {len(blockers)} of them blockers: "
            f"no blocker followed by {repeats} times a flush and the same kernels"
        )
    intervals = [(x.start, x.end) for x in behind]
    return [intervals[i + 1 : i + each] for i in range(0, len(behind), each)]
