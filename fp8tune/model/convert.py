"""Convert and revert a Linear in place.

The same object takes another class and that class's attributes, and gives them back.
The module, its Parameters, its hooks and everybody's references to it stay, so an
optimizer, DDP, FSDP2 or a tensor-parallel plan that already holds them needs no change,
and state_dict keys do not move.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from fp8tune.errors import ModelError
from fp8tune.model.experts import plain_class
from fp8tune.model.rerouting import attach, detach
from fp8tune.model.sharding import is_plain_linear, rebase, rebase_subclass

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from torch import nn


__all__ = [
    "change_class",
    "convert_by",
    "is_converted",
    "restore_class",
    "revert_by",
    "reverted",
    "take_back",
]

# Attributes of the user's that a conversion hides, kept on the layer itself so that they
# travel with copies and pickles of it.
_HIDDEN = "_hidden_by_conversion"

# Why the calls of a grouped GEMM are led through it; see ``fp8tune.model.rerouting``.
_CONVERTED = "converted"


class Converts(Protocol):
    """What converts a Linear in place, and back; see ``fp8tune.recipes.Recipe``."""

    def convert(self, linear: nn.Linear) -> None:
        """Switch a plain nn.Linear to the recipe."""
        ...

    def revert(self, linear: nn.Linear) -> None:
        """Switch it back to a plain nn.Linear."""
        ...


class _Change(NamedTuple):
    kind: type[nn.Linear]
    attributes: Mapping[str, Any]


# Of layers, not of their weights: torch's swap_tensors refuses tensors that are referred
# to weakly.
_CHANGES: weakref.WeakKeyDictionary[nn.Module, _Change] = weakref.WeakKeyDictionary()


def change_class(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    """Make a plain ``nn.Linear``, or grouped GEMM, an instance of ``kind``.

    Attributes of the user's that have the same names are put aside until
    ``restore_class``.

    Args:
        linear: a module whose type is ``nn.Linear``, or what fully_shard made of it; or
            ``GroupedLinear``, whose owner then calls it.
        kind: a subclass of that type with the same Parameters.
        attributes: what instances of ``kind`` have besides those of that type.
    """
    changed = rebase(type(linear), plain_class(linear), kind)
    assert changed is not None, f"{type(linear).__name__} is no plain nn.Linear"
    linear.__class__ = changed
    own = vars(linear)
    hidden = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    if hidden:
        own[_HIDDEN] = hidden
    _CHANGES[linear] = _Change(kind, attributes)
    attach(linear, _CONVERTED)


def restore_class(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    """Undo ``change_class`` with the same arguments.

    It also works on a layer that torch has given a subclass of ``kind`` meanwhile, as a
    parametrization does.

    Raises:
        ModelError: the layer's class was changed to another one meanwhile.
    """
    _restore(linear, kind, attributes)
    _CHANGES.pop(linear, None)
    detach(linear, _CONVERTED)


def _restore(
    linear: nn.Linear, kind: type[nn.Linear], attributes: Mapping[str, Any]
) -> None:
    found, plain = type(linear), plain_class(linear)
    restored = rebase(found, kind, plain) or rebase_subclass(found, kind, plain)
    if restored is None:
        raise ModelError(
            f"a layer that was converted to {kind.__name__} has become a "
            f"{found.__name__}, so it cannot be taken back to high precision; change "
            "layers before AutoFloat8, or after auto.abandon()"
        )
    linear.__class__ = restored
    own = vars(linear)
    for name in attributes:
        own.pop(name, None)
    own.update(own.pop(_HIDDEN, {}))


def convert_by(recipe: Converts, linear: nn.Linear) -> None:
    """Convert a layer and note how, also where a recipe of the user's sets the class."""
    before = set(vars(linear))
    recipe.convert(linear)
    if linear not in _CHANGES:
        added = {name: x for name, x in vars(linear).items() if name not in before}
        _CHANGES[linear] = _Change(type(linear), added)


def revert_by(recipe: Converts, linear: nn.Linear) -> None:
    """Undo ``convert_by``."""
    recipe.revert(linear)
    _CHANGES.pop(linear, None)


def is_converted(linear: nn.Module) -> bool:
    """Whether it was converted by this module, and not taken back."""
    return linear in _CHANGES


def take_back(linear: nn.Module, twin: nn.Module) -> None:
    """Do to a layer's twin what ``restore_class`` would do to the layer, if converted."""
    change = _CHANGES.get(linear)
    if change is not None:
        _restore(cast("nn.Linear", twin), *change)


@contextmanager
def reverted(conversions: Sequence[tuple[nn.Linear, Converts]]) -> Generator[None]:
    """Inside the block these converted Linears run in high precision."""
    # Not those that a block around this one has reverted.
    here = [x for x in conversions if not is_plain_linear(x[0])]
    for linear, recipe in here:
        revert_by(recipe, linear)
    try:
        yield
    finally:
        for linear, recipe in here:
            # One that was parametrized meanwhile cannot be converted again.
            if is_plain_linear(linear):
                convert_by(recipe, linear)
