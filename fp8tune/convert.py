"""Convert and revert a Linear in place.

The same object takes another class and that class's attributes, and gives them back.
The module, its Parameters, its hooks and everybody's references to it stay, so an
optimizer, DDP, FSDP2 or a tensor-parallel plan that already holds them needs no change,
and state_dict keys do not move.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fp8tune.sharding import rebase

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from fp8tune.recipes import Recipe

__all__ = ["change_class", "restore_class", "reverted"]


def change_class(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    """Make a plain ``nn.Linear`` an instance of ``kind``.

    Args:
        linear: a module whose type is ``nn.Linear``, or what fully_shard made of it.
        kind: a subclass of ``nn.Linear`` with the same Parameters.
        attributes: what instances of ``kind`` have besides those of ``nn.Linear``.
    """
    _swap(linear, nn.Linear, kind)
    linear.__dict__.update(attributes)


def restore_class(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    """Undo ``change_class`` with the same arguments."""
    _swap(linear, kind, nn.Linear)
    for name in attributes:
        del linear.__dict__[name]


def _swap(linear: nn.Linear, old: type[nn.Linear], new: type[nn.Linear]) -> None:
    changed = rebase(type(linear), old, new)
    assert changed is not None, f"{type(linear).__name__} is no {old.__name__}"
    linear.__class__ = changed


@contextmanager
def reverted(conversions: Sequence[tuple[nn.Linear, Recipe]]) -> Generator[None]:
    """Inside the block these converted Linears run in high precision."""
    for linear, recipe in conversions:
        recipe.revert(linear)
    try:
        yield
    finally:
        for linear, recipe in conversions:
            recipe.convert(linear)
