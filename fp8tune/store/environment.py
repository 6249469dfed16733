"""What a measurement is true of: the hardware and the software that ran it."""

import importlib.metadata
import platform
from pathlib import Path

import torch

__all__ = ["MEASURING_VERSION", "describe_environment"]

# Raised when the way of timing changes, so that older timings are not compared with new
# ones. 1: paired fwd+bwd of a lone Linear, flushed caches, blocked queue on CUDA.
MEASURING_VERSION = 1


def describe_environment(device: torch.device) -> tuple[tuple[str, str], ...]:
    """Sorted (field, value) pairs; timings are reused only where all are equal."""
    hardware = _gpu(device) if device.type == "cuda" else _cpu()
    software = {
        "fp8tune_measuring": str(MEASURING_VERSION),
        "torch": torch.__version__,
        "torchao": _version_of("torchao"),
        "triton": _version_of("triton"),
    }
    return tuple(sorted((hardware | software).items()))


def _gpu(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": properties.name,
        "capability": f"{major}.{minor}",
        "sm_count": str(properties.multi_processor_count),
        "driver": _driver_version(),
        **_libraries(),
    }


def _libraries() -> dict[str, str]:
    if torch.version.hip:
        return {"rocm": torch.version.hip}
    cublas = _version_of("nvidia-cublas", "nvidia-cublas-cu12")
    return {"cuda": str(torch.version.cuda), "cublas": cublas}


def _driver_version() -> str:
    """The kernel driver's version; torch does not tell it."""
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(path).read_text().strip()
        except OSError:
            continue
    return "unknown"


def _cpu() -> dict[str, str]:
    return {
        "device": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def _version_of(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
