"""Peaks of parts, on simulated GPUs, whose own statistics are the user's."""

import logging

import pytest
import torch

from fp8tune.timing.memory import PeakMemory, peak_bytes
from tests.simulated_gpu import SimulatedGpu

MB = 2**20
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def gpus(monkeypatch):
    gpu = SimulatedGpu(devices=2)
    gpu.install(monkeypatch)
    return gpu


def use(gpu, device, size):
    gpu.work([5.0], device=device, allocates=size)()


def test_the_peak_of_work_is_that_of_its_own_device(gpus):
    work = gpus.work([5.0], device=SECOND, allocates=300 * MB)
    gpus.memory(SECOND).allocate(100 * MB)
    assert peak_bytes(SECOND, work) == 300 * MB
    assert gpus.memory(FIRST).resets == 0
    assert gpus.current == 0


def test_a_cpu_has_no_peak():
    assert peak_bytes(torch.device("cpu"), lambda: None) is None
    assert PeakMemory([torch.device("cpu")]).read() is None


@pytest.mark.parametrize("own_mb", [10, 500])
def test_the_users_own_peak_stays_what_it_was_or_rises(gpus, own_mb):
    use(gpus, FIRST, 400 * MB)
    assert peak_bytes(FIRST, gpus.work([5.0], allocates=own_mb * MB)) == own_mb * MB
    assert torch.cuda.max_memory_allocated(FIRST) == max(400, own_mb) * MB
    assert torch.cuda.memory_allocated(FIRST) == 0


def test_after_an_error_too(gpus):
    use(gpus, FIRST, 400 * MB)
    with pytest.raises(RuntimeError, match="no kernel"):
        peak_bytes(FIRST, gpus.work([5.0], error=RuntimeError("no kernel")))
    assert torch.cuda.max_memory_allocated(FIRST) == 400 * MB


def test_several_parts_keep_the_highest_of_all(gpus):
    use(gpus, SECOND, 400 * MB)
    peak = PeakMemory([FIRST, SECOND, FIRST])
    for size, device in ((100, FIRST), (200, SECOND), (50, FIRST)):
        peak.reset()
        use(gpus, device, size * MB)
        assert peak.read() == size * MB
    peak.restore()
    assert torch.cuda.max_memory_allocated(FIRST) == 100 * MB
    assert torch.cuda.max_memory_allocated(SECOND) == 400 * MB


def test_nothing_is_asked_of_the_driver_to_restore_a_peak(gpus, caplog):
    caplog.set_level(logging.DEBUG, "fp8tune")
    use(gpus, FIRST, 400 * MB)
    torch.cuda.empty_cache()
    peak_bytes(FIRST, gpus.work([5.0], allocates=10 * MB))
    assert torch.cuda.memory_reserved(FIRST) == 10 * MB
    assert f"was {400 * MB} bytes before tuning" in caplog.text
