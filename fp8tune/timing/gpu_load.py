"""What the driver says of a GPU, by nvidia-ml-py where it is installed."""

from __future__ import annotations

import importlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import torch

from fp8tune.decision.load import GpuLoad

__all__ = ["GpuState", "gpu_load", "read_gpu"]

logger = logging.getLogger("fp8tune")

# Reasons for which a clock is held down; idling and settings of the user are none.
# Names of NVML's constants nvmlClocksThrottleReason* (NVML API reference).
_REASONS = {
    "SwPowerCap": "sw_power_cap",
    "HwSlowdown": "hw_slowdown",
    "HwThermalSlowdown": "hw_thermal_slowdown",
    "HwPowerBrakeSlowdown": "hw_power_brake_slowdown",
    "SwThermalSlowdown": "sw_thermal_slowdown",
    "SyncBoost": "sync_boost",
}

# Utilisation is asked for the last second, in which the driver takes some samples.
_WINDOW_US = 1_000_000


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    Attributes:
        others_percent: utilisation by other processes over the last second, or None
            where the driver does not say.
        throttled: why the clock is held down.
        clock_mhz: the SM clock.
    """

    others_percent: int | None
    throttled: frozenset[str]
    clock_mhz: int


def read_gpu(device: torch.device) -> GpuState | None:
    """Look at a GPU; None without nvidia-ml-py or an NVIDIA driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            return _read(nvml, _handle(nvml, device))
        finally:
            nvml.nvmlShutdown()
    except Exception as problem:  # noqa: BLE001 - a report must not end training
        logger.debug("no load of %s: %s", device, problem)
        return None


def _handle(nvml: Any, device: torch.device) -> Any:
    # By UUID, since CUDA_VISIBLE_DEVICES numbers GPUs anew.
    uuid = torch.cuda.get_device_properties(device).uuid
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())


def _read(nvml: Any, handle: Any) -> GpuState:
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    throttled = frozenset(
        said
        for name, said in _REASONS.items()
        if bits & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
    )
    clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    return GpuState(_others_percent(nvml, handle), throttled, clock_mhz)


def _others_percent(nvml: Any, handle: Any) -> int | None:
    """Utilisation of all processes but this one.

    In a container the driver may number processes as the host does. Where this one is not
    among those that it lists, nobody can say which of them are others.
    """
    listed = {x.pid for x in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    if os.getpid() not in listed:
        return None
    if len(listed) == 1:
        return 0
    since = int(time.time() * 1e6) - _WINDOW_US
    try:
        samples = nvml.nvmlDeviceGetProcessUtilization(handle, since)
    except nvml.NVMLError_NotFound:  # nobody ran anything
        return 0
    newest = {x.pid: x.smUtil for x in sorted(samples, key=lambda x: x.timeStamp)}
    return sum(percent for pid, percent in newest.items() if pid != os.getpid())


def gpu_load(before: GpuState | None, after: GpuState | None) -> GpuLoad | None:
    """Two looks at a GPU, as a measurement keeps them."""
    if before is None or after is None:
        return None
    looks = (before, after)
    percents = [x.others_percent for x in looks if x.others_percent is not None]
    return GpuLoad(
        max(percents, default=None),
        tuple(sorted(before.throttled | after.throttled)),
        (before.clock_mhz, after.clock_mhz),
    )
