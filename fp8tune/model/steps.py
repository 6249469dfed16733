"""Where one training step ends and the next begins, whoever calls the model and how.

A step is an optimizer's: calls of the model whose gradients come back, be they several
micro-batches, and then an optimizer that steps, or gradients that are reset to None.
Nothing is asked of the training loop; three signs are looked at, the surest first:

1. An optimizer that holds parameters of the model: its steps are the steps.
2. Without one, as in loops that update by hand: gradients that were there are None.
3. With neither, a call after a backward begins a new step. Such a loop cannot be told
   from micro-batches that nobody adds up.

A step that was skipped, as gradient scalers do when the loss overflows, is one with the
step after it.
"""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

__all__ = ["Steps"]


class Steps:
    """Counts the training steps of a model.

    Args:
        module: the model; its parameters tell which optimizers are its own.
        stepped: called after each step of such an optimizer, with the number of them
            since the last call of ``begin``.

    Attributes:
        completed: steps that are over.
        passes_without_gradient: calls of ``begin`` since a gradient reached the model.
        passes_in_step: calls of ``begin`` in the step that is under way.
    """

    def __init__(
        self, module: nn.Module, stepped: Callable[[int], object] = bool
    ) -> None:
        self.completed = 0
        self.passes_without_gradient = 0
        self.passes_in_step = 0
        self._module = module
        self._told = stepped
        self._since_pass = 0
        self._gradients = False
        self._stepped = False
        self._optimizer_steps: bool | None = None
        # Those that hold what stands in for the parameters while the model is called, as
        # torch.func.functional_call does; when they step, nothing stands in any more.
        self._own: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._resets = False
        _remove_dead()
        note: Any = partial(_noted, weakref.ref(self))
        self._handle = register_optimizer_step_post_hook(note)
        # Also where tuning is given up together with the model; but not at once, since
        # that may be found while an optimizer calls its hooks.
        self._given_up = weakref.finalize(self, _DEAD.append, self._handle)
        self._given_up.atexit = False

    def begin(self) -> bool:
        """Called before each pass: a call of the model, or of a part of it, with gradients.

        Returns:
            Whether it is the first of a new step, the step before being over.
        """
        over = self._is_over()
        if over:
            self.completed += 1
            self.passes_in_step = 0
            self._gradients = self._stepped = False
        self.passes_in_step += 1
        self.passes_without_gradient += 1
        self._since_pass = 0
        return over

    def saw_gradient(self) -> None:
        """Called when a gradient reaches the model."""
        self._gradients = True
        self.passes_without_gradient = 0
        # Reentrant checkpointing of a whole model makes the first pass unseen.
        self.passes_in_step = max(1, self.passes_in_step)

    @property
    def begun(self) -> int:
        """Steps that have begun, the one that is under way included."""
        return self.completed + bool(self.passes_in_step)

    @property
    def over(self) -> int:
        """Steps that are over, be it that the next one has not begun."""
        return self.completed + self._is_over()

    @property
    def fresh(self) -> bool:
        """Whether no gradient of the step that is under way has been seen."""
        return not self._gradients

    def close(self) -> None:
        """Stop counting; nothing is left in torch."""
        self._given_up.detach()
        self._handle.remove()
        _remove_dead()

    def _is_over(self) -> bool:
        if not self.passes_in_step or not (self._gradients or self._stepped):
            return False
        if self._optimizer_steps is None:
            self._own.update(x for x in _optimizers() if self._owned_by(x))
            self._optimizer_steps = bool(self._own)
        return self._stepped if self._optimizer_steps else self._is_reset()

    def _is_reset(self) -> bool:
        trained = (x for x in self._module.parameters() if x.requires_grad)
        reset = all(x.grad is None for x in trained)
        self._resets = self._resets or reset
        return reset or not self._resets

    def _owned_by(self, optimizer: Optimizer) -> bool:
        groups = getattr(optimizer, "param_groups", ())  # none while it is being built
        held = {id(x) for group in groups for x in group["params"]}
        return any(id(x) in held for x in self._module.parameters())

    def _optimizer_stepped(self, optimizer: Optimizer) -> None:
        watched = self.passes_in_step or self._told is not bool
        if not (watched and (optimizer in self._own or self._owned_by(optimizer))):
            return
        if self.passes_in_step:
            self._optimizer_steps = self._stepped = True
        self._since_pass += 1
        self._told(self._since_pass)


# Hooks of those that are gone, which do nothing.
_DEAD: list[RemovableHandle] = []


def _remove_dead() -> None:
    while _DEAD:
        _DEAD.pop().remove()


# A compiled optimizer would trace its hooks; torch breaks its graph there anyway.
@torch.compiler.disable  # pyright: ignore[reportUntypedFunctionDecorator]
def _noted(
    steps: weakref.ref[Steps], optimizer: Optimizer, args: Any, kwargs: Any
) -> None:
    del args, kwargs
    found = steps()
    if found is not None:
        found._optimizer_stepped(optimizer)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _optimizers() -> list[Any]:
    """Every optimizer of this process; torch keeps no list of them."""
    kinds = _subclasses(Optimizer)
    return [x for x in gc.get_objects() if type(x) in kinds]


def _subclasses(kind: type) -> set[type]:
    direct = set(kind.__subclasses__())
    return direct.union(*(_subclasses(x) for x in direct))
