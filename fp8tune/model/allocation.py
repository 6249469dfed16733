"""Whether an error means that memory ran out."""

import re

import torch

__all__ = ["is_out_of_memory"]

# Besides errors of torch's own allocator: those of the driver (torch.AcceleratorError,
# "CUDA error: out of memory"; Triton's "[CUDA]: out of memory"; HIP's
# hipErrorOutOfMemory), of libraries that allocate themselves (CUBLAS_STATUS_ALLOC_FAILED,
# CUDNN_STATUS_ALLOC_FAILED and its CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED),
# and the CPU allocator's bare RuntimeError.
_SAYINGS = re.compile(
    r"(CUDA|HIP|\[CUDA\]|\[HIP\])[^\n]*: out of memory|hipErrorOutOfMemory"
    r"|(CU|HIP)BLAS(LT)?_STATUS_ALLOC_FAILED|CUDNN_STATUS_\w*ALLOC"
    r"|DefaultCPUAllocator",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this error says that an allocation failed, on GPU or CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and _SAYINGS.search(str(error)):
        return True
    # torch.compile raises an error of its own while it handles what ended compiling.
    reasons = (error.__cause__, error.__context__)
    return any(x is not None and is_out_of_memory(x) for x in reasons)
