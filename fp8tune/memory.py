"""How much memory there is, and whether an error means that it ran out."""

import os
from collections.abc import Callable

import torch

__all__ = ["default_capture_bytes", "is_out_of_memory", "peak_bytes"]

# Small beside what a training step keeps alive anyway, and enough for the inputs and
# output gradients of a block: 1.6 GB of 80.
_CAPTURE_SHARE = 0.02


def default_capture_bytes(device: torch.device) -> int:
    """2% of the device's memory, in bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * _CAPTURE_SHARE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that an allocation failed, on GPU or CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator raises a bare RuntimeError.
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return True
    # torch.compile raises an error of its own while it handles what ended compiling.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Most bytes that the work had allocated at a time, beyond what was there before.

    On a GPU this resets torch's own peak statistics, which cannot be put back.

    Args:
        device: where the work allocates.
        work: run once.

    Returns:
        The bytes, or None on a CPU, whose allocator keeps no account.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
