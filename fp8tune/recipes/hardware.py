"""Which GEMMs a device has. CUDA and ROCm devices are both of torch's type "cuda".

A table says where trying makes sense, and one small layer whether it works: which kernels
there are depends on the versions of torch, CUDA and torchao too.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.experts import stand_in

__all__ = [
    "has_blockwise_gemms",
    "has_float8_gemms",
    "has_grouped_float8_gemms",
    "has_mx_gemms",
    "runs_converted",
    "runs_experts",
]

logger = logging.getLogger("fp8tune")

# Features and rows of the layer that is tried; all GEMMs of all recipes take it.
_SIDE = 128

# Architectures of AMD's GPUs with float8 GEMMs: MI300 (fnuz dtypes, which torchao picks),
# MI350, and Navi 4.
_ROCM_FLOAT8 = ("gfx94", "gfx95", "gfx12")
# And those whose grouped GEMMs torch has in float8: MI300 and MI350.
_ROCM_GROUPED_FLOAT8 = ("gfx94", "gfx95")


def has_float8_gemms(device: torch.device) -> bool:
    """Whether the device has float8 GEMMs; which scales they take is to be tried.

    That is compute capability 8.9 and newer. ROCm's numbers do not compare with these:
    MI200 is 9.0 and has no float8.

    Args:
        device: where the model runs.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return _rocm_architecture(device).startswith(_ROCM_FLOAT8)
    return torch.cuda.get_device_capability(device) >= (8, 9)


def has_grouped_float8_gemms(device: torch.device) -> bool:
    """Whether the device may have grouped GEMMs in float8 with a scale for each row.

    That is compute capability 9.0 and newer, of which torch says that it supports 9.0 and
    10.0; whether one runs is to be tried.

    Args:
        device: where the model runs.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return _rocm_architecture(device).startswith(_ROCM_GROUPED_FLOAT8)
    return torch.cuda.get_device_capability(device) >= (9, 0)


def has_blockwise_gemms(device: torch.device) -> bool:
    """Whether the GEMMs scale blocks of 128, as torchao's blockwise prototype wants them.

    That is Hopper, compute capability 9.0, for which its kernels were written.

    Args:
        device: where the model runs.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def has_mx_gemms(device: torch.device) -> bool:
    """Whether the GEMMs scale blocks of 32 natively, as torchao's mxfp8 wants them.

    That is compute capability 10.0 and newer. MI350 has such GEMMs too, but torchao 0.18
    has no casts for them there.

    Args:
        device: where the model runs.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (10, 0)


def _rocm_architecture(device: torch.device) -> str:
    """Such as "gfx942:sramecc+:xnack-"."""
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))


def runs_converted(
    name: str, convert: Callable[[nn.Linear], None], device: torch.device
) -> bool:
    """Whether one small converted layer runs forward and backward, as in training.

    Random state, grad mode and autocast are those of before. Memory that runs out says
    nothing about the kernels, so that counts as running.

    Args:
        name: of the recipe, for the log.
        convert: converts a Linear in place.
        device: where the model runs.
    """
    without = f"{name} is emulated on {device}"
    return _runs(partial(_run_converted, convert, device), device, without)


def runs_experts(
    name: str, convert: Callable[[nn.Linear], None], device: torch.device
) -> bool:
    """Whether one small grouped GEMM of experts does; see ``runs_converted``."""
    without = f"{name} leaves experts on {device} in high precision"
    return _runs(partial(_run_experts, convert, device), device, without)


def _runs(run: Callable[[], object], device: torch.device, without: str) -> bool:
    gpus = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(gpus),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            run()
    except Exception as error:  # noqa: BLE001 - whatever a missing kernel raises
        if not is_out_of_memory(error):
            first_line = str(error).strip().split("\n", 1)[0]
            logger.warning("%s: %s", without, first_line)
            return False
    return True


def _run_converted(convert: Callable[[nn.Linear], None], device: torch.device) -> None:
    kind = torch.bfloat16
    linear = nn.Linear(_SIDE, _SIDE, bias=False, device=device, dtype=kind)
    convert(linear)
    ones = torch.ones(_SIDE, _SIDE, device=device, dtype=kind, requires_grad=True)
    linear(ones).sum().backward()


def _run_experts(convert: Callable[[nn.Linear], None], device: torch.device) -> None:
    """With an expert that has no rows, one that has few, and an odd number of them."""
    kind = torch.bfloat16
    stack = torch.ones(3, _SIDE, _SIDE, device=device, dtype=kind)
    offs = torch.tensor([0, 5, _SIDE], device=device, dtype=torch.int32)
    gemm = stand_in(nn.Parameter(stack), offs, transposed=False)
    convert(gemm)
    ones = torch.ones(_SIDE, _SIDE, device=device, dtype=kind, requires_grad=True)
    gemm.owner(ones).sum().backward()
