"""Forward passes of the model that wait for their backward, and training steps.

A *pass* is one forward of the model with gradients enabled. Its output carries a hook
that marks it as soon as backward reaches it, and that dies with the graph; so passes
that still wait for their backward can be told from those that will never get one.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["Passes", "at_end_of_backward", "in_backward"]


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread.

    torch has no public call for this; torch.utils.checkpoint uses the same one.
    """
    core = torch._C  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    graph_task = getattr(core, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1


def at_end_of_backward(callback: Callable[[], None]) -> bool:
    """Call back when the backward pass that is running has ended, DDP's part included.

    torch has no public call for this; DDP and FSDP use the same one.

    Returns:
        False where torch does not offer it.
    """
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    queue = getattr(engine, "queue_callback", None)
    if queue is None:
        return False
    # Queued from a callback, it comes after those that were queued during backward.
    queue(partial(queue, callback))
    return True


class _Pass:
    """One forward of the model, alive as long as its graph is."""

    __slots__ = ("__weakref__", "backward_seen")

    def __init__(self) -> None:
        self.backward_seen = False


class Passes:
    """Counts training steps: forwards with gradients, then a backward.

    Args:
        backward_began: called when backward reaches the output of a pass.

    Attributes:
        steps: completed training steps.
    """

    def __init__(self, backward_began: Callable[[], object] = bool) -> None:
        self.steps = 0
        self._backward_began = backward_began
        self._backward_seen = False
        self._alive: list[weakref.ref[_Pass]] = []

    def begin(self) -> bool:
        """Called before each forward of a training step.

        Returns:
            Whether a training step was completed before it.
        """
        completed, self._backward_seen = self._backward_seen, False
        self.steps += completed
        return completed

    def ended(self, output: object) -> None:
        """Called with what the forward returned."""
        this_pass = _Pass()
        self._alive.append(weakref.ref(this_pass))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(partial(self._reached, this_pass))

    def _reached(self, this_pass: _Pass, grad: torch.Tensor) -> None:
        del grad
        self.saw_backward()
        if not this_pass.backward_seen:
            this_pass.backward_seen = True
            self._backward_began()

    def saw_backward(self) -> None:
        """A gradient reached the model, be it not through its output."""
        self._backward_seen = True

    @property
    def waiting(self) -> int:
        """Passes whose graph is alive and whose backward has not begun."""
        found = [x for ref in self._alive if (x := ref()) and not x.backward_seen]
        self._alive = [weakref.ref(x) for x in found]
        return len(found)
