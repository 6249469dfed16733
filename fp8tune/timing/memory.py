"""How much memory there is, and how much a piece of work needs."""

import logging
import os
from collections.abc import Callable, Iterable

import torch

from fp8tune.model.allocation import is_out_of_memory

__all__ = ["PeakMemory", "default_capture_bytes", "free_bytes", "peak_bytes"]

logger = logging.getLogger("fp8tune")

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


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a GPU: free ones, and those torch reserved."""
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + spare


class PeakMemory:
    """The most memory that is allocated at a time, in parts, on some GPUs.

    torch keeps one peak for each device, which the user's trainer logs too. To see the
    peak of a part it has to be reset; so what it was before each reset is kept, and
    ``restore`` makes torch's peak that again.

    Args:
        devices: those of them that are GPUs are watched.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        gpus = dict.fromkeys(x for x in devices if x.type == "cuda")
        self._highest = dict.fromkeys(gpus, 0)

    def reset(self) -> None:
        """A part begins."""
        for device in self._highest:
            self._keep(device)
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int | None:
        """Bytes at the peak since the last reset, of the fullest GPU; None without one."""
        peaks = [torch.cuda.max_memory_allocated(x) for x in self._highest]
        return max(peaks, default=None)

    def _keep(self, device: torch.device) -> None:
        peak = torch.cuda.max_memory_allocated(device)
        self._highest[device] = max(peak, self._highest[device])

    def restore(self) -> None:
        """Make torch's peak at least what it was before the first reset.

        Where that is not possible it stays that of the last part, which is logged at
        DEBUG with the larger number.
        """
        for device in self._highest:
            self._keep(device)
            if not _raise_peak(device, self._highest[device]):
                logger.debug(
                    "torch.cuda.max_memory_allocated(%s) was %d bytes before tuning",
                    device,
                    self._highest[device],
                )


def _raise_peak(device: torch.device, wanted: int) -> bool:
    """Allocate for a moment what is missing from a peak; there is no way to set it.

    Nothing is allocated that the process has not reserved already.
    """
    if torch.cuda.max_memory_allocated(device) >= wanted:
        return True
    allocated = torch.cuda.memory_allocated(device)
    missing = wanted - allocated
    if missing > torch.cuda.memory_reserved(device) - allocated:
        return False
    try:
        torch.empty(missing, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int | None:
    """Most bytes that the work had allocated at a time, beyond what was there before.

    Args:
        device: where the work allocates; torch's own peak is put back, see PeakMemory.
        work: run once.

    Returns:
        The bytes, or None on a CPU, whose allocator keeps no account.
    """
    if device.type != "cuda":
        return None
    peak = PeakMemory([device])
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    peak.reset()
    try:
        work()
        torch.cuda.synchronize(device)
        found = peak.read()
    finally:
        peak.restore()
    return None if found is None else found - before
