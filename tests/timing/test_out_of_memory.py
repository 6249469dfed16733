"""Memory that runs out at any allocation while measuring leaves training untouched.

On CPU a dispatch mode stands in for an allocator that is full: it sees every operation
that makes a new tensor, in backward too. On a GPU the process gets a part of its memory.
"""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8tune import AutoFloat8, Reason, TuneConfig, get_recipe
from fp8tune.decision.records import Shape, Signature
from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.candidates import Sample
from fp8tune.model.kept import Kept
from fp8tune.timing import gemms
from fp8tune.timing.measure import measure_all
from fp8tune.timing.memory import default_capture_bytes
from tests.helpers import hooks_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

BF16 = get_recipe("bf16", "cpu")
# Whatever can be timed is converted, so that the plan tells what failed.
CONFIG = TuneConfig(
    max_samples=8,
    max_seconds=1e-3,
    min_speedup=1e-9,
    include_output_layer=True,
)
FULL = "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."
FOREVER = 10**9

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"
)


class FullMemory(TorchDispatchMode):
    """Fails the allocations with the given numbers, counted from 0, or one by name.

    Args:
        failing: their numbers.
        operation: its first allocation fails too.

    Attributes:
        allocations: how many there were.
        operations: what made them.
        failed: the operations that failed.
    """

    def __init__(self, failing: Container[int], operation: str = "") -> None:
        super().__init__()
        self._failing = failing
        self._operation = operation
        self.allocations = 0
        self.operations: set[str] = set()
        self.failed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        is_new = not any(x.alias_info for x in func._schema.returns)
        if is_new and any(getattr(x, "is_cpu", False) for x in tree_leaves(result)):
            self._allocate(func)
        return result

    def _allocate(self, func: object) -> None:
        number, self.allocations = self.allocations, self.allocations + 1
        name = str(func)
        is_named = name == self._operation and name not in self.operations
        self.operations.add(name)
        if is_named or number in self._failing:
            self.failed.append(name)
            raise RuntimeError(FULL)


@contextmanager
def while_measuring(memory: FullMemory) -> Iterator[FullMemory]:
    """Measuring has a thread of its own, which modes of this one do not reach."""

    def measure(*args: object, **kwargs: object) -> object:
        with memory:
            return measure_all(*args, **kwargs)

    with mock.patch.object(gemms, "measure_all", measure):
        yield memory


@pytest.fixture
def many_freezes() -> Iterator[None]:
    """Nothing is logged, and collecting garbage looks at what is new only."""
    logging.disable(logging.WARNING)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 32))


def step(model: nn.Module, seed: int) -> None:
    tensor = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    model(tensor).square().mean().backward()


@cache
def by_hand(fqns: frozenset[str]) -> list[torch.Tensor]:
    """Gradients of a step of the model that was converted and never tuned."""
    model = two_layers()
    for fqn in fqns:
        BF16.convert(model.get_submodule(fqn))
    step(model, 2)
    return [x.grad for x in model.parameters()]


def freeze(failing: Container[int], operation: str = "") -> FullMemory:
    """Tune while these allocations fail; nothing else may come of it."""
    auto = AutoFloat8(two_layers(), recipe="bf16", config=CONFIG)
    step(auto, 1)
    seed = torch.get_rng_state()
    with while_measuring(FullMemory(failing, operation)) as memory:
        plan = auto.freeze()
    reasons = {x.reason for x in plan.decisions}
    assert auto.frozen
    assert reasons <= {Reason.FASTER, Reason.OUT_OF_MEMORY}
    assert memory.failed or reasons == {Reason.FASTER}
    assert torch.equal(torch.get_rng_state(), seed)
    assert hooks_of(auto) == {}
    auto.zero_grad()
    step(auto, 2)
    grads = [x.grad for x in auto.parameters()]
    assert all(map(torch.equal, grads, by_hand(frozenset(plan.converted_fqns))))
    return memory


def until_none_fails(failures: Iterator[Container[int]]) -> list[FullMemory]:
    """One freeze after the other, until one ends before its failures begin."""
    done = []
    for failing in failures:
        done.append(freeze(failing))
        if not done[-1].failed:
            return done
    raise AssertionError("it never ends")


# Every second or fifth allocation, since the same few operations come again and again.
@pytest.mark.slow
@pytest.mark.usefixtures("many_freezes")
def test_any_one_allocation_may_fail() -> None:
    operations = freeze(()).operations
    # The cache flush, the casts, the forward's GEMM, and the bias gradient, which only
    # backward computes.
    assert operations >= {
        "aten.empty.memory_format",
        "aten._to_copy.default",
        "aten.addmm.default",
        "aten.sum.dim_IntList",
    }
    # By name, since how often warming up calls them differs from run to run.
    for operation in sorted(operations):
        assert freeze((), operation).failed == [operation]
    done = until_none_fails({k} for k in itertools.count(step=2))
    assert len(done) > 100


@pytest.mark.usefixtures("many_freezes")
def test_memory_may_stay_full_from_any_allocation_on() -> None:
    done = until_none_fails(range(k, FOREVER) for k in itertools.count(step=5))
    assert len(done) > 40


@pytest.mark.usefixtures("many_freezes")
def test_any_allocation_of_the_second_try_may_fail_too() -> None:
    # How many there are differs from run to run, since warming up takes 3 calls or more.
    for k in itertools.count(1, 5):
        failed = freeze({0, k}).failed
        if len(failed) == 1:
            break
    assert k > 100


def test_both_layers_run_out_of_memory_that_stays_full() -> None:
    auto = AutoFloat8(two_layers(), recipe="bf16", config=CONFIG)
    step(auto, 1)
    with while_measuring(FullMemory(range(FOREVER))):
        plan = auto.freeze()
    assert [x.reason for x in plan.decisions] == [Reason.OUT_OF_MEMORY] * 2
    assert plan["0"].detail.startswith("RuntimeError: DefaultCPUAllocator")


def linear_sample() -> Sample:
    shape = Shape(8, 16, 16, "float32", "float32", None, False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    linear = nn.Linear(16, 16, bias=False)
    return Sample(signature, linear, torch.randn(8, 16), torch.randn(8, 16))


def test_the_second_try_has_the_room_of_the_captured_tensors(
    scripted_clock: type,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # A record at DEBUG holds the error, which holds the tensors.
    caplog.set_level(logging.WARNING, "fp8tune")
    captured: list[weakref.ref[torch.Tensor]] = []
    alive: list[list[bool]] = []

    def sample() -> Sample:
        made = linear_sample()
        captured.extend(weakref.ref(x) for x in (made.input, made.grad_output))
        return made

    def fail_once(signature: Signature, variant: str) -> float:
        del signature, variant
        alive.append([x() is not None for x in captured])
        if len(alive) == 1:
            raise MemoryError("9 GB")
        return 1.0

    clock = scripted_clock(fail_once)
    (result,) = measure_all(sample, [BF16], clock, CONFIG)
    assert result.failure is None
    assert alive[0] == [True, True]
    assert alive[-1] == [False, False]


def test_running_out_of_memory_while_compiling_is_out_of_memory() -> None:
    def backend(graph: object, inputs: object) -> object:
        raise torch.OutOfMemoryError("9 GB")

    with pytest.raises(Exception, match="9 GB") as caught:
        torch.compile(nn.Linear(4, 4), backend=backend)(torch.ones(2, 4))
    assert type(caught.value) is not torch.OutOfMemoryError
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("no kernel"))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "HIP error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        FULL,
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_memory_that_ran_out_has_many_names(words: str, kind: type[Exception]) -> None:
    assert is_out_of_memory(kind(words))
    chained = ValueError("no plan")
    chained.__cause__ = kind(words)
    assert is_out_of_memory(chained)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED",
    ],
)
def test_other_errors_of_a_gpu_are_not_about_memory(words: str) -> None:
    assert not is_out_of_memory(torch.AcceleratorError(words))


def test_the_drivers_own_error_leads_to_release_and_another_try(
    scripted_clock: type,
) -> None:
    released: list[bool] = []

    def fail_once(signature: Signature, variant: str) -> float:
        del signature, variant
        if not released:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return 1.0

    (result,) = measure_all(
        linear_sample,
        [BF16],
        scripted_clock(fail_once),
        CONFIG,
        release=lambda: released.append(True),
    )
    assert released == [True]
    assert result.failure is None


# On a GPU


class Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def gpu_model() -> nn.Sequential:
    """Eight blocks in float32, so that bf16 GEMMs are tuned on any GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return nn.Sequential(*(Residual(1024) for _ in range(8)))


def gpu_step(model: nn.Module) -> None:
    model.zero_grad()
    generator = torch.Generator("cuda").manual_seed(1)
    tensor = torch.randn(4096, 1024, device="cuda", generator=generator)
    model(tensor).square().mean().backward()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("spare", [0, 2, 16, 64, 128, 256, 1024])
def test_a_gpu_that_is_full_leaves_training_alone(spare: int) -> None:
    auto = AutoFloat8(gpu_model(), recipe="bf16", config=CONFIG)
    gpu_step(auto)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + spare * 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        plan = auto.freeze()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    reasons = {x.reason for x in plan.decisions}
    assert reasons <= {Reason.FASTER, Reason.OUT_OF_MEMORY}
    assert Reason.OUT_OF_MEMORY in reasons or spare > 0
    assert hooks_of(auto) == {}
    gpu_step(auto)
    other = gpu_model()
    for fqn in plan.converted_fqns:
        BF16.convert(other.get_submodule(fqn))
    gpu_step(other)
    pairs = zip(auto.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.gpu
@needs_gpu
def test_tuning_adds_at_most_capture_bytes_to_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks: list[int] = []
    reset = torch.cuda.reset_peak_memory_stats

    def noted(*args: object) -> None:
        peaks.append(torch.cuda.max_memory_allocated())
        reset(*args)

    def peak_of_two_steps(model: nn.Module) -> int:
        noted()
        peaks.clear()
        gpu_step(model)
        gpu_step(model)
        noted()
        return max(peaks)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", noted)
    model = gpu_model()
    untuned = peak_of_two_steps(model)
    config = replace(CONFIG, min_speedup=1.0)
    auto = AutoFloat8(model, recipe="bf16", warmup_steps=1, config=config)
    tuned = peak_of_two_steps(auto)
    assert auto.frozen
    assert tuned <= untuned + default_capture_bytes(torch.device("cuda"))


@pytest.mark.gpu
@needs_gpu
def test_nothing_is_left_in_the_memory_of_the_gpu() -> None:
    model = gpu_model()
    gpu_step(model)  # cuBLAS makes its workspace
    model.zero_grad()
    gc.collect()
    before = torch.cuda.memory_allocated()
    auto = AutoFloat8(model, recipe="bf16", config=CONFIG)
    gpu_step(auto)
    auto.freeze()
    auto.zero_grad()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP error: out of memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_in_capture_by_any_name_releases_what_was_kept(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    auto = AutoFloat8(two_layers(), recipe="bf16", config=CONFIG)
    put, calls = Kept.put, itertools.count()

    def fails_after_one(kept: Kept, shape: Shape, tensor: torch.Tensor) -> None:
        if next(calls):
            raise error
        put(kept, shape, tensor)

    with mock.patch.object(Kept, "put", fails_after_one):
        step(auto, 1)
    assert "no memory to keep tensors for timing" in caplog.text
    assert next(calls) > 1
    assert not auto._tuner._pipeline.capture._tensors._inputs._by_m
    assert len(auto.freeze().converted_fqns) == 2


def test_an_error_of_another_kind_in_capture_is_the_users() -> None:
    auto = AutoFloat8(two_layers(), recipe="bf16", config=CONFIG)
    error = RuntimeError("no kernel image")
    with (
        mock.patch.object(Kept, "put", side_effect=error),
        pytest.raises(RuntimeError, match="no kernel image"),
    ):
        step(auto, 1)
