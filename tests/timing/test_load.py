"""How busy the machine was: noticed, said, not kept, and sampled longer for."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fp8tune import TuneConfig
from fp8tune.decision.load import STEADY_SHARE, GpuLoad, Load
from fp8tune.decision.records import Measurement
from fp8tune.report.messages import measurement_line
from fp8tune.timing.cpu_clock import CpuClock
from fp8tune.timing.gpu_load import GpuState, _read, gpu_load, read_gpu
from fp8tune.timing.sampling import sample_until_clear

CONFIG = TuneConfig(max_samples=64)


class Item:
    """Work that says who it is."""

    signature = None

    def __init__(self, variant, run=lambda: None):
        self.variant = variant
        self._run = run
        self.works = [self]

    def __call__(self):
        self._run()


class SharesClock:
    """Twice as fast always; the thread has as much of a core as the script says."""

    def __init__(self, shares):
        self._script = shares
        self._seconds = 0.0
        self.shares = []
        self.pairs = 0

    def time_ms(self, work):
        self.shares = [self._script(self.pairs + i // 2) for i in range(len(work))]
        self.pairs += len(work) // 2
        times = [2.0 if x.variant == "reference" else 1.0 for x in work]
        self._seconds += sum(times) / 1e3
        return times

    def now(self):
        return self._seconds


VARIANTS = [Item("reference"), Item("recipe")]


def sampled(shares):
    return sample_until_clear(VARIANTS, SharesClock(shares), CONFIG)


def test_an_undisturbed_sample_ends_when_it_is_clear():
    rounds = sampled(lambda _: 0.99)
    assert len(rounds.times) < 64
    assert rounds.load(1).cpu_shares == (0.99,) * len(rounds.times)
    assert rounds.load(1).steady


def test_a_disturbed_sample_goes_on_until_the_budget_ends_and_is_unsteady():
    rounds = sampled(lambda _: 0.7)
    assert len(rounds.times) == 64
    assert not rounds.load(1).steady


def test_a_sample_whose_disturbance_passes_ends_steady():
    rounds = sampled(lambda pair: 0.5 if pair < 4 else 1.0)
    assert 8 < len(rounds.times) < 64
    assert rounds.load(1).steady


@pytest.mark.parametrize(("share", "steady"), [(STEADY_SHARE, True), (0.89, False)])
def test_nine_tenths_of_a_core_are_enough(share, steady):
    assert Load((share,) * 8).steady is steady


def test_the_lesser_share_of_a_pair_counts():
    clock = SharesClock(lambda _: 1.0)
    time_ms = clock.time_ms

    def one_slow(work):
        times = time_ms(work)
        clock.shares = [0.4 if x.variant == "recipe" else 1.0 for x in work]
        return times

    clock.time_ms = one_slow
    rounds = sample_until_clear(VARIANTS, clock, CONFIG)
    assert set(rounds.load(1).cpu_shares) == {0.4}


def test_a_thread_that_waits_has_a_small_share():
    clock = CpuClock()
    clock.time_ms([Item("waits", lambda: time.sleep(0.02))])
    assert clock.shares[0] < 0.5


def test_there_is_one_share_between_0_and_1_for_each_piece_of_work():
    clock = CpuClock()
    clock.time_ms([Item("computes", lambda: sum(range(10_000)))] * 3)
    assert len(clock.shares) == 3
    assert all(0 < x <= 1 for x in clock.shares)


def test_the_line_says_what_disturbed_it(make_signature):
    times = (2.0,) * 8
    busy = Measurement(make_signature, "bf16", times, times, load=Load((0.6,) * 8))
    line = measurement_line(busy, CONFIG)
    assert "UNSTEADY" in line
    assert "its thread had a core for 60% of the time" in line
    free = replace(busy, load=Load((1.0,) * 8))
    assert "UNSTEADY" not in measurement_line(free, CONFIG)


@pytest.fixture
def make_signature():
    from fp8tune.decision.records import Shape, Signature  # noqa: PLC0415

    shape = Shape(64, 32, 16, "float32", "float32", None, False)
    return Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)


# GPUs, by a driver that answers from a script


def nvml(pids, utilisation, bits=0, clock=1980):
    """The part of pynvml that is used, of which this process is number 7."""
    return SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVMLError_NotFound=LookupError,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: bits,
        nvmlDeviceGetClockInfo=lambda _, kind: clock * kind,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [
            SimpleNamespace(pid=x) for x in pids
        ],
        nvmlDeviceGetProcessUtilization=lambda _, since: [
            SimpleNamespace(pid=pid, smUtil=percent, timeStamp=since)
            for pid, percent in utilisation.items()
        ],
    )


@pytest.fixture
def seven(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 7)


@pytest.mark.usefixtures("seven")
def test_utilisation_by_other_processes_makes_a_gpu_unsteady():
    state = _read(nvml([7, 8, 9], {7: 80, 8: 30, 9: 10}, bits=4 | 1), None)
    assert state == GpuState(40, frozenset({"sw_power_cap"}), 1980)
    load = gpu_load(GpuState(0, frozenset(), 1755), state)
    assert load == GpuLoad(40, ("sw_power_cap",), (1755, 1980))
    assert not Load(gpu=load).steady
    assert "other processes used 40% of the GPU" in Load(gpu=load).said
    assert "held down (sw_power_cap)" in Load(gpu=load).said


@pytest.mark.usefixtures("seven")
def test_a_gpu_of_ones_own_is_steady():
    state = _read(nvml([7], {7: 90}), None)
    assert state.others_percent == 0
    assert Load(gpu=gpu_load(state, state)).steady


@pytest.mark.usefixtures("seven")
def test_where_the_driver_numbers_processes_otherwise_nothing_is_said_of_others():
    state = _read(nvml([4711], {4711: 90}), None)
    assert state.others_percent is None
    assert Load(gpu=gpu_load(state, state)).steady


def test_without_a_driver_nothing_is_known_and_nothing_raised(caplog):
    caplog.set_level("WARNING")
    if not torch.cuda.is_available():
        assert read_gpu(torch.device("cuda:0")) is None
    assert caplog.messages == []
