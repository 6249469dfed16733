"""Tensors in whatever a forward returns."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["elements_in", "tensors_in"]


def tensors_in(output: object) -> Iterator[torch.Tensor]:
    """Tensors in nested containers, dataclasses and objects with attributes.

    Modules are not looked into: their tensors are weights and no results.
    """
    seen: set[int] = set()
    waiting: list[Any] = [output]
    while waiting:
        for leaf in tree_leaves(waiting.pop()):
            if isinstance(leaf, torch.Tensor):
                yield leaf
            elif id(leaf) not in seen:
                seen.add(id(leaf))
                waiting += _parts(leaf)


def elements_in(inputs: object) -> int:
    """Elements of a forward's inputs; objects are looked into where no tensor is plain."""
    plain = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    return sum(x.numel() for x in plain or tensors_in(inputs))


def _parts(leaf: object) -> list[Any]:
    if isinstance(leaf, type | torch.nn.Module):
        return []
    fields = dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ()
    named = [getattr(leaf, x.name, None) for x in fields]
    return named or [*getattr(leaf, "__dict__", {}).values(), *_in_slots(leaf)]


def _in_slots(leaf: object) -> Iterator[Any]:
    for kind in type(leaf).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            # A private name is stored under a longer one.
            private = name.startswith("__") and not name.endswith("__")
            stored = f"_{kind.__name__.lstrip('_')}{name}" if private else name
            yield getattr(leaf, stored, None)
