"""The CUDA clock under everything that a GPU and its driver do to it, simulated."""

import gc
import logging
import math
from statistics import median

import pytest
import torch

from fp8tune.config import TuneConfig
from fp8tune.decision.intervals import speedup_interval
from fp8tune.timing.cuda_clock import CudaClock
from fp8tune.timing.sampling import sample_until_clear
from tests.helpers import signature
from tests.simulated_gpu import SimulatedGpu

CUDA = torch.device("cuda", 0)
# Microseconds of one piece of work, and how many kernels it has.
SIZES = [5, 20, 100, 1000, 5000, 20000]
LAUNCHES = [3, 15, 40]
SPEEDUP = 1.3


def pair(gpu, total_us, launches, **options):
    """A reference, and a candidate that is 1.3 times faster with twice the launches."""
    reference = gpu.work([total_us / launches] * launches, **options)
    fast = [total_us / SPEEDUP / (2 * launches)] * (2 * launches)
    return reference, gpu.work(fast, "rowwise", **options)


def rounds(gpu, variants, clock=None, **config):
    """What measuring makes of them, and the seconds it took."""
    clock = clock or CudaClock(CUDA)
    clock.warm_up(variants)
    started = gpu.now_us
    settings = TuneConfig(max_samples=64, max_seconds=1.0, **config)
    times = sample_until_clear(variants, clock, settings).times
    return list(zip(*times, strict=True)), (gpu.now_us - started) / 1e6


def assert_close(times, work):
    """1%, and 1.5 us for the two events."""
    assert median(times) == pytest.approx(work.true_ms, rel=0.01, abs=1.5e-3)


def check(gpu, total_us, launches, **options):
    reference, candidate = pair(gpu, total_us, launches, **options)
    (slow, fast), seconds = rounds(gpu, [reference, candidate])
    assert_close(slow, reference)
    assert_close(fast, candidate)
    if total_us >= 100:
        found = speedup_interval([a / b for a, b in zip(slow, fast, strict=True)], 0.95)
        assert found.middle == pytest.approx(SPEEDUP, rel=0.01)
    assert seconds < 1.5
    return seconds


def no_change(gpu):
    del gpu


def jitter(gpu):
    gpu.jitter = 0.5


def slow_python(gpu):
    gpu.launch_us = 25.0


def boost(gpu):
    """15% faster after each block, which draws no power; gone in some milliseconds."""
    blocked = [0.0]
    gpu.after_block = lambda end: blocked.__setitem__(0, end)
    gpu.slowdown = lambda at: 1 / (1 + 0.15 * math.exp(-(at - blocked[0]) / 2000))


@pytest.mark.parametrize("launches", LAUNCHES)
@pytest.mark.parametrize("total_us", SIZES)
@pytest.mark.parametrize("change", [no_change, jitter, slow_python])
def test_launch_gaps_are_charged_to_nobody(gpu, change, total_us, launches):
    change(gpu)
    check(gpu, total_us, launches)


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("total_us", SIZES)
def test_the_blocker_may_last_another_time_than_when_it_was_calibrated(
    gpu, factor, total_us
):
    clock = CudaClock(CUDA)
    gpu.sleep_factor = lambda: factor
    reference, candidate = pair(gpu, total_us, 15)
    (slow, fast), seconds = rounds(gpu, [reference, candidate], clock)
    assert_close(slow, reference)
    assert_close(fast, candidate)
    assert seconds < 1.5


def test_the_blocker_is_calibrated_again_by_every_batch(gpu):
    clock = CudaClock(CUDA)
    gpu.sleep_factor = lambda: 0.2
    work = gpu.work([10.0] * 15)
    clock.warm_up([work])
    for _ in range(20):
        clock.time_ms([work] * 4)
    assert clock.discarded <= 1


@pytest.mark.parametrize("total_us", [100, 1000, 20000])
def test_drift_of_20_percent_falls_on_both(gpu, total_us):
    gpu.slowdown = lambda at: 1 + 0.2 * min(1.0, at / 1e6)
    reference, candidate = pair(gpu, total_us, 15)
    (slow, fast), _ = rounds(gpu, [reference, candidate])
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    assert median(ratios) == pytest.approx(SPEEDUP, rel=0.01)


@pytest.mark.parametrize("total_us", [100, 300, 1000, 3000, 20000])
def test_a_boost_after_the_blocker_helps_both_alike(gpu, total_us):
    boost(gpu)
    reference, candidate = pair(gpu, total_us, 15)
    (slow, fast), _ = rounds(gpu, [reference, candidate])
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    assert median(ratios) == pytest.approx(SPEEDUP, rel=0.01)


def test_a_full_queue_is_no_reason_to_time_one_by_one(gpu):
    clock = CudaClock(CUDA)
    work = gpu.work([4.0] * 130)
    clock.warm_up([work])
    times = clock.time_ms([work] * 16)
    assert all(x == pytest.approx(work.true_ms, rel=0.01, abs=1.5e-3) for x in times)
    assert clock.discarded == clock.with_gaps == 0
    started = gpu.now_us
    for _ in range(10):
        clock.time_ms([work] * 16)
    # Were the wait for the queue taken for enqueueing, each block would double.
    assert gpu.now_us - started < 10 * 30e3


def test_work_larger_than_the_queue_is_timed(gpu, caplog):
    clock = CudaClock(CUDA)
    work = gpu.work([12.0] * 1500)
    clock.warm_up([work])
    started = gpu.now_us
    times = clock.time_ms([work] * 4)
    assert all(x == pytest.approx(work.true_ms, rel=0.01) for x in times)
    assert gpu.now_us - started < 1e6
    assert "timings include launch gaps" in caplog.text


@pytest.mark.parametrize("total_us", [100, 1000, 20000])
def test_synchronising_work_costs_no_more_than_its_budget(gpu, caplog, total_us):
    clock = CudaClock(CUDA)
    stuck = pair(gpu, total_us, 15, waits=True)
    _, seconds = rounds(gpu, stuck, clock)
    assert seconds < 1.5
    assert caplog.text.count("the GPU waited for the CPU") == 1
    assert "does the model synchronise in forward?" in caplog.text
    # The next signature does not, and is timed as if nothing had been.
    free = pair(gpu, total_us, 15, signature=signature(32, 16, 16))
    before = clock.discarded
    (slow, _), _ = rounds(gpu, free, clock)
    assert_close(slow, free[0])
    assert clock.discarded <= before + 1


@pytest.mark.parametrize("pause_ms", [10, 40, 140, 400])
def test_a_pause_of_the_cpu_is_forgotten(gpu, pause_ms):
    clock = CudaClock(CUDA)
    variants = pair(gpu, 100, 15)
    clock.warm_up(variants)
    a, b = variants
    gpu.pauses = {gpu.launches + 20: pause_ms * 1e3}
    times = clock.time_ms([a, b, b, a])
    assert clock.discarded == 1
    assert_close([times[0], times[3]], a)
    pairs, started = 0, gpu.now_us
    while gpu.now_us - started < 1e6:
        clock.time_ms([a, b, b, a])
        pairs += 2
    assert pairs >= 100
    assert clock.discarded == 1


@pytest.mark.parametrize("pause_ms", [10, 40, 140, 400])
@pytest.mark.parametrize("total_us", [20, 1000])
def test_pauses_while_a_signature_is_timed(gpu, pause_ms, total_us):
    reference, candidate = pair(gpu, total_us, 15)
    gpu.pauses = {800: pause_ms * 1e3}
    (slow, fast), seconds = rounds(gpu, [reference, candidate])
    assert_close(slow, reference)
    assert_close(fast, candidate)
    assert seconds < 1.5


def test_garbage_is_not_collected_inside_a_batch(gpu):
    seen = []
    work = gpu.work([10.0])
    launch = gpu.launch
    gpu.launch = lambda *args: (seen.append(gc.isenabled()), launch(*args))
    clock = CudaClock(CUDA)
    clock.time_ms([work] * 2)
    assert seen == [False, False]
    assert gc.isenabled()
    gc.disable()
    try:
        clock.time_ms([work])
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_side_streams_that_are_joined_are_timed(gpu):
    work = gpu.work([100.0] * 5, side=torch.cuda.Stream())
    clock = CudaClock(CUDA)
    clock.warm_up([work])
    assert_close(clock.time_ms([work] * 8), work)


def test_work_on_the_current_stream_is_timed(gpu):
    clock, work = CudaClock(CUDA), gpu.work([100.0] * 5)
    with torch.cuda.stream(torch.cuda.Stream()):
        clock.warm_up([work])
        assert_close(clock.time_ms([work] * 8), work)


def test_caches_are_cold(gpu):
    clock, work = CudaClock(CUDA), gpu.work([100.0], reads="weight")
    clock.warm_up([work])
    assert_close(clock.time_ms([work] * 8), work)


def test_work_on_another_device_is_refused(monkeypatch):
    gpu = SimulatedGpu(devices=2)
    gpu.install(monkeypatch)
    elsewhere = gpu.work([1001.0] * 3, device=torch.device("cuda", 1))
    clock = CudaClock(CUDA)
    expected = r"work on cuda:1 cannot be timed by the clock of cuda:0; use clock_for\("
    with pytest.raises(ValueError, match=expected):
        clock.warm_up([elsewhere])
    with pytest.raises(ValueError, match=expected):
        clock.time_ms([elsewhere])
    own = CudaClock(torch.device("cuda", 1))
    own.warm_up([elsewhere])
    assert_close(own.time_ms([elsewhere] * 4), elsewhere)
    assert gpu.current == 0
    start = own.mark()
    elsewhere()
    assert own.elapsed_ms(start, own.mark(), None) == pytest.approx(3.003, rel=0.02)


def test_an_error_in_between_leaves_a_clock_that_works(gpu):
    clock, good = CudaClock(CUDA), gpu.work([100.0] * 5)
    clock.warm_up([good])
    bad = gpu.work([100.0], "rowwise", error=RuntimeError("no kernel"))
    with pytest.raises(RuntimeError, match="no kernel"):
        clock.time_ms([good, bad, bad, good])
    assert torch.cuda.current_stream(CUDA).free_at <= gpu.now_us
    assert gc.isenabled()
    assert_close(clock.time_ms([good] * 4), good)


def test_an_allocation_that_waits_for_the_gpu_is_survived(gpu):
    clock, work = CudaClock(CUDA), gpu.work([100.0] * 5, allocates=2**30)
    clock.warm_up([work])
    memory = gpu.devices[0].memory
    memory.reserved = memory.total
    times = clock.time_ms([work] * 4)
    assert len(times) == 4
    assert clock.with_gaps == 1
    torch.cuda.empty_cache()
    assert_close(clock.time_ms([work] * 4), work)


def test_out_of_memory_while_the_flush_is_allocated_is_the_allocators_error(gpu):
    gpu.devices[0].memory.total = 2**20
    clock = CudaClock(CUDA)
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        clock.time_ms([gpu.work([5.0])])


def test_without_the_blocking_kernel_times_come_with_a_warning(
    gpu, monkeypatch, caplog
):
    monkeypatch.delattr(torch.cuda, "_sleep")
    _, seconds = rounds(gpu, pair(gpu, 1000, 15))
    assert seconds < 1.5
    assert "this torch has no torch.cuda._sleep" in caplog.text


def test_blocking_launches_are_named(gpu, monkeypatch, caplog):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    gpu.blocking = True
    _, seconds = rounds(gpu, pair(gpu, 1000, 15))
    assert seconds < 1.5
    assert "CUDA_LAUNCH_BLOCKING is set: tune without it" in caplog.text


def test_batches_that_are_thrown_away_are_counted_and_logged(gpu, caplog):
    caplog.set_level(logging.DEBUG, "fp8tune")
    clock, work = CudaClock(CUDA), gpu.work([10.0] * 5)
    clock.warm_up([work])
    gpu.pauses = {gpu.launches + 2: 50e3}
    clock.time_ms([work] * 2)
    assert clock.discarded == 1
    assert "launch gaps: batch 1 is timed again" in caplog.text


def test_work_that_takes_python_long_is_queued_one_by_one(gpu):
    clock, work = CudaClock(CUDA), gpu.work([100.0] * 5, python_us=60e3)
    clock.warm_up([work])
    assert_close(clock.time_ms([work] * 4), work)
    assert clock.with_gaps == 0


def test_the_rows_of_a_batch_stay_in_order(gpu):
    clock = CudaClock(CUDA)
    a, b = gpu.work([100.0]), gpu.work([400.0], "rowwise")
    times = clock.time_ms([a, b, b, a])
    assert times == pytest.approx([0.1, 0.4, 0.4, 0.1], rel=0.02)
