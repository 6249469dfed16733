"""The device that a command runs on."""

import torch

from fp8tune.errors import ConfigError

__all__ = ["pick_device"]


def pick_device(name: str | None) -> torch.device:
    """The named device, or a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    available = torch.cuda.is_available()
    wanted = name or ("cuda" if available else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"no device {wanted!r}; give cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"nothing is timed on {wanted!r}; give cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"torch finds no device {wanted!r} here; give cpu")
    return device
