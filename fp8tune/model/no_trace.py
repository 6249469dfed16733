"""One more forward of the user's model that training does not notice.

It runs without gradients. Random state, buffers (running statistics, counters) and
autocast's cache of weights are afterwards what they were. What a model keeps elsewhere, as
in attributes that its forward sets, is not put back.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import nn

__all__ = ["without_trace"]


@contextmanager
def without_trace(module: nn.Module) -> Generator[None]:
    """Inside the block the model may be called.

    Args:
        module: the model; so much memory as its buffers take is needed once more.
    """
    devices = {x.device for x in module.parameters() if x.device.type == "cuda"}
    caches = torch.is_autocast_cache_enabled()
    # Some versions of torch take kept casts that were made without gradients for those of
    # training.
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.random.fork_rng(sorted(devices, key=str)),
            torch.no_grad(),
            _copies_of_buffers(module),
        ):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


@contextmanager
def _copies_of_buffers(module: nn.Module) -> Generator[None]:
    """Inside the block the model has copies of its buffers, which are then let go of.

    Not the other way round: batch norm changes its statistics without a new version, and
    putting numbers back would make one.
    """
    registries = [x._buffers for x in module.modules()]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    own = [dict(x) for x in registries]
    copies: dict[int, torch.Tensor] = {}
    for registry in registries:
        for name, x in registry.items():
            if x is not None:
                registry[name] = copies.setdefault(id(x), x.detach().clone())
    try:
        yield
    finally:
        for registry, before in zip(registries, own, strict=True):
            registry.clear()
            registry.update(before)
