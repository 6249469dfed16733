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

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from fp8tune.recipes import Recipe

__all__ = ["change_class", "restore_class", "reverted"]


def change_class(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    """Make a plain ``nn.Linear`` an instance of ``kind``.

    Args:
        linear: a module whose type is exactly ``nn.Linear``.
        kind: a subclass of ``nn.Linear`` with the same Parameters.
        attributes: what instances of ``kind`` have besides those of ``nn.Linear``.
    """
    assert type(linear) is nn.Linear, f"{type(linear).__name__} is converted already"
    linear.__dict__.update(attributes)
    linear.__class__ = kind


def restore_class(linear: nn.Linear, attributes: Mapping[str, Any]) -> None:
    """Undo ``change_class`` with the same attributes."""
    linear.__class__ = nn.Linear
    for name in attributes:
        del linear.__dict__[name]


@contextmanager
def reverted(linears: Sequence[nn.Linear], recipe: Recipe) -> Generator[None]:
    """Inside the block these converted Linears run in high precision."""
    for linear in linears:
        recipe.revert(linear)
    try:
        yield
    finally:
        for linear in linears:
            recipe.convert(linear)
