"""Whether torch.func is at work, under which tensors are wrappers that soon die."""

from typing import Any

import torch

__all__ = ["is_wrapped", "under_transform"]


def under_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap and the like) is active.

    torch has no public call for this; torch.autograd.Function uses the same one.
    """
    core = torch._C  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    active = getattr(core, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a wrapper of a transform, or of gradients in a batch.

    ``torch.autograd.grad(..., is_grads_batched=True)`` has an older kind of vmap, which
    only shows in the tensor.
    """
    core: Any = torch._C  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    keys = getattr(core, "_dispatch_key_set", None)
    return under_transform() or (keys is not None and "Batched" in keys(tensor))
