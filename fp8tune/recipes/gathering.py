"""Which weights of a model are gathered in float8, and what has to go with it.

While any is, the scales of all are found in one all-reduce after each step of an optimizer
that holds them; what a state_dict has of them is plain, and loading forgets their scales.
Nothing of it is left when none is.
"""

from __future__ import annotations

import weakref
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8tune.recipes.all_gather import (
    ShardedWeight,
    missing_places,
    precompute_scales,
    resharded,
    sharded_weights,
    takes,
    unwrapped,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from fp8tune.recipes.recipe import Recipe

__all__ = ["Gathering"]


class Gathering:
    """Switches the all-gather of a model's weights.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._on: dict[int, _Gathered] = {}
        self._handle: RemovableHandle | None = None
        self._known: dict[int, ShardedWeight] = {}
        self._missing: list[str] = []

    @property
    def masters(self) -> int:
        """How many of them are kept in float32, from which the cast is then made."""
        weights = [x.weight.linear.weight for x in self._on.values()]
        return sum(x.dtype is torch.float32 for x in weights)

    @property
    def number(self) -> int:
        """How many weights are gathered in float8 right now."""
        return len(self._on)

    def refusals(self, linears: Iterable[nn.Linear]) -> list[str]:
        """Why weights of converted layers cannot be gathered in float8, one for each."""
        self._look()
        configs = [(x, getattr(x, "config", None)) for x in linears]
        return [why for x, config in configs if (why := self._why_not(x, config))]

    def fits(self, layers: Iterable[tuple[nn.Linear, Recipe]]) -> bool:
        """Whether the weight of any of these can, once it is converted to its recipe."""
        self._look()
        configs = [(x, getattr(recipe, "config", None)) for x, recipe in layers]
        return any(self._why_not(x, config) is None for x, config in configs)

    def _look(self) -> None:
        # Until it is sharded, which may come after it was wrapped.
        if not self._known:
            self._missing = missing_places(self._module)
            self._known = {} if self._missing else sharded_weights(self._module)

    def _why_not(self, linear: nn.Linear, config: object) -> str | None:
        if self._missing:
            return f"this version of torch keeps {', '.join(self._missing)} elsewhere"
        weight = self._known.get(id(linear))
        if weight is None:
            return "FSDP2 does not shard it"
        if not takes(config):
            return (
                "its recipe does not scale the whole weight at once, as tensorwise does"
            )
        return weight.why_not()

    def turn_on(
        self,
        linears: Iterable[nn.Linear],
        scales: Mapping[int, torch.Tensor | None] = MappingProxyType({}),
    ) -> None:
        """Gather these converted layers in float8, as far as they can be.

        Args:
            linears: the layers.
            scales: what ``scales`` returned, if the weights have not changed since.
        """
        self._look()
        new = [
            self._known[id(x)]
            for x in linears
            if id(x) not in self._on
            and self._why_not(x, getattr(x, "config", None)) is None
        ]
        with resharded(new):
            for weight in new:
                number = id(weight.linear)
                self._on[number] = _Gathered(weight, scales.get(number))
        if self._on and self._handle is None:
            note: Any = partial(_stepped, weakref.ref(self))
            self._handle = register_optimizer_step_post_hook(note)

    def turn_off(self, linears: Iterable[nn.Linear]) -> None:
        """Gather these in high precision; to be done before they are reverted."""
        old = [x for linear in linears if (x := self._on.pop(id(linear), None))]
        with resharded(x.weight for x in old):
            for gathered in old:
                gathered.end()
        if not self._on and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def scales(self) -> dict[int, torch.Tensor | None]:
        """The scales of all weights that are gathered in float8, by the id of the layer."""
        return {number: x.weight.scale for number, x in self._on.items()}

    def after_step(self, optimizer: Optimizer) -> None:
        """Find the scales anew, if the optimizer holds one of the weights."""
        linears = [x.weight.linear for x in self._on.values()]
        ours = {id(x.weight) for x in linears}
        groups: list[dict[str, Any]] = optimizer.param_groups
        if any(id(x) in ours for group in groups for x in group["params"]):
            precompute_scales(linears)


# A compiled optimizer would trace its hooks.
@torch.compiler.disable  # pyright: ignore[reportUntypedFunctionDecorator]
def _stepped(
    gathering: weakref.ref[Gathering], optimizer: Optimizer, args: Any, kwargs: Any
) -> None:
    del args, kwargs
    found = gathering()
    if found is not None:
        found.after_step(optimizer)


class _Gathered:
    """A weight while it is gathered in float8."""

    def __init__(self, weight: ShardedWeight, scale: torch.Tensor | None) -> None:
        self.weight = weight
        weight.turn_on(scale)
        linear: Any = weight.linear
        self._handles = [
            linear.register_state_dict_post_hook(_plain),
            linear.register_load_state_dict_post_hook(partial(_forget_scale, weight)),
        ]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.weight.turn_off()


def _plain(
    linear: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    del linear, metadata
    key = f"{prefix}weight"
    if key in state:
        state[key] = unwrapped(state[key])


def _forget_scale(weight: ShardedWeight, linear: nn.Module, keys: object) -> None:
    del linear, keys
    weight.scale = None
