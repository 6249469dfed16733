"""The Linears of a model, and its grouped GEMMs, under the names that people use."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fp8tune.model.experts import GroupedLinear, experts_of

__all__ = ["dtype_name", "named_gemms", "named_linears", "normalize_fqn"]

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
    return ((x, y) for x, y in named_gemms(module) if not isinstance(y, GroupedLinear))


def named_gemms(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The Linears, and what may be a grouped GEMM of experts, in model order.

    A grouped GEMM has the name of its Parameter.
    """
    wrappers = [
        f"{fqn}.".lstrip(".")
        for fqn, child in module.named_modules()
        if isinstance(child, DataParallel | DistributedDataParallel)
    ]
    for fqn, child in module.named_modules():
        name = normalize_fqn(_without_module(fqn, wrappers))
        if isinstance(child, nn.Linear):
            yield name, child
        for parameter, gemm in experts_of(child):
            yield f"{name}.{parameter}".lstrip("."), gemm


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
