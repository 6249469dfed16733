"""The Linears of a model under the names that people use for them."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["dtype_name", "named_linears", "normalize_fqn"]

# Wrappers that put themselves between a module and its parent, so that the same layer
# has one name in every run: torch.compile, activation checkpointing, FSDP1, Fabric.
_WRAPPERS = {
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
}


def normalize_fqn(fqn: str) -> str:
    """The name without what torch.compile, checkpointing and FSDP wrappers add."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)


def named_linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every ``nn.Linear`` of the model, subclasses included, in model order.

    A Linear that is used under several names comes once, under its first; a model that
    is itself a Linear has the name "".
    """
    wrappers = [
        f"{fqn}.".lstrip(".")
        for fqn, child in module.named_modules()
        if isinstance(child, DataParallel | DistributedDataParallel)
    ]
    for fqn, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield normalize_fqn(_without_module(fqn, wrappers)), child


def _without_module(fqn: str, wrappers: list[str]) -> str:
    # By the wrapper's type and place, since a model may have a child called "module".
    for wrapper in reversed(wrappers):
        if fqn.startswith(f"{wrapper}module."):
            fqn = wrapper + fqn.removeprefix(f"{wrapper}module.")
        elif fqn == f"{wrapper}module":
            fqn = wrapper.removesuffix(".")
    return fqn


def dtype_name(dtype: object) -> str:
    """``torch.bfloat16`` -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
