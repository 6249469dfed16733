"""Which GEMMs a device has. CUDA and ROCm devices are both of torch's type "cuda"."""

import torch

__all__ = ["has_float8_gemms", "has_mx_gemms"]

# Architectures of AMD's GPUs with float8 GEMMs: MI300 (fnuz dtypes, which torchao picks),
# MI350, and Navi 4.
_ROCM_FLOAT8 = ("gfx94", "gfx95", "gfx12")


def has_float8_gemms(device: torch.device, *, rowwise: bool) -> bool:
    """Whether torch._scaled_mm runs natively.

    Tensorwise scales need compute capability 8.9, rowwise ones 9.0 (torchao's own
    assertions in its float8 recipes). ROCm's numbers do not compare with these: MI200 is
    9.0 and has no float8.

    Args:
        device: where the model runs.
        rowwise: whether each row has its own scale.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return _rocm_architecture(device).startswith(_ROCM_FLOAT8)
    needed = (9, 0) if rowwise else (8, 9)
    return torch.cuda.get_device_capability(device) >= needed


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
