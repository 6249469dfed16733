"""What is called for the model: itself, or what it was compiled to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fp8tune.compiling.apply import (
    apply_compile,
    compile_for_trial,
    gate_calls,
    uncompile,
)
from fp8tune.report import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import nn

    from fp8tune.compiling.apply import Compile, Gate
    from fp8tune.recipes.recipe import Recipe

__all__ = ["Target"]


class Target:
    """Compiles the model as asked for, at first for a trial if there is one.

    Args:
        module: the model.
        compile: what the user asked for.
        say: logs.

    Attributes:
        call: what to call for the model.
    """

    def __init__(
        self,
        module: nn.Module,
        compile: Compile,
        say: Callable[[int, object], None],
    ) -> None:
        self.call: Callable[..., Any] = module
        self._module = module
        self._compile = compile
        self._say = say
        self._ungate: Callable[[], None] = _nothing

    def compile(self, recipes: Collection[Recipe]) -> None:
        """Compile for good.

        Args:
            recipes: what Linears are converted to.
        """
        self.call = apply_compile(self._module, self._compile, recipes, self._say)

    def compile_for_trial(self, recipes: Collection[Recipe], gate: Gate) -> None:
        """Compile so that plans can be tried, with a gate around each call.

        Args:
            recipes: what Linears may be converted to.
            gate: see ``fp8tune.compiling.apply.gate_calls``.
        """
        tried = compile_for_trial(self._compile)
        if tried is not self._compile:
            self._say(logging.INFO, messages.NO_GRAPHS_IN_TRIAL)
        compiled = apply_compile(self._module, tried, recipes, self._say)
        self.call, self._ungate = gate_calls(self._module, compiled, gate)

    def end_trial(self, recipes: Collection[Recipe]) -> None:
        """Take the gate away, and compile again what was tried in another way."""
        self._ungate()
        if compile_for_trial(self._compile) is not self._compile:
            self.compile(recipes)

    def gate(self, gate: Gate) -> None:
        """Put a gate around each call of the model that stays until ``abandon``.

        Args:
            gate: see ``fp8tune.compiling.apply.gate_calls``.
        """
        self.call, self._ungate = gate_calls(self._module, self.call, gate)

    def say_bypassed(self) -> None:
        """Training calls other things than the model, which runs uncompiled there."""
        if isinstance(self._compile, Mapping | bool) and self._compile is not False:
            self._say(logging.WARNING, messages.BYPASSED_LINE)

    def abandon(self) -> None:
        """Call the bare model again, uncompiled."""
        self._ungate()
        uncompile(self._module)
        self.call = self._module


def _nothing() -> None:
    """There is no gate to remove."""
