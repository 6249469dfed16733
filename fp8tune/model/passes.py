"""Passes through the model that wait for their backward.

A *pass* is one forward of the model with gradients enabled, or, where training calls
other methods or parts of the model, a run of calls of its layers. What it returns
carries a hook that marks it as soon as backward reaches it, and that dies with the
graph; so passes that still wait for their backward can be told from those that will
never get one. A backward with ``retain_graph`` leaves the graph to another backward, and
the pass is one that waits for as long as the graph lives.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fp8tune.model.outputs import tensors_in

__all__ = [
    "Pass",
    "Passes",
    "at_end_of_backward",
    "in_backward",
    "keeps_graph",
]


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread.

    torch has no public call for this; torch.utils.checkpoint uses the same one.
    """
    core = torch._C  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    graph_task = getattr(core, "_current_graph_task_id", None)
    return graph_task is not None and graph_task() != -1


def keeps_graph() -> bool:
    """Whether the backward pass that is running leaves its graph to another one.

    torch has no public call for this; its compiled backwards use the same one.
    """
    core = torch._C  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    autograd: Any = getattr(core, "_autograd", None)
    kept = getattr(autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and bool(kept())


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


class Pass:
    """One pass, alive as long as its graph is.

    Attributes:
        backward_seen: whether a gradient reached it.
        retained: whether the last backward that reached it left the graph alive.
        held: whether a tensor of its graph holds it.
        calls: what was called in it, for whoever counts calls.
        training: whether the model was in training mode.
        products: matrix products that are no candidate's, or None if nobody counted.
    """

    __slots__ = (
        "__weakref__",
        "backward_seen",
        "calls",
        "held",
        "products",
        "retained",
        "training",
    )

    def __init__(self, *, training: bool = True) -> None:
        self.backward_seen = self.retained = self.held = False
        self.calls: list[Any] = []
        self.training = training
        self.products: list[Any] | None = None


class Passes:
    """The passes that are alive, and how many of them were followed by a backward.

    Args:
        backward_began: called when backward reaches the output of a pass.
        confirmed: called with that pass.

    Attributes:
        steps: forwards, or several, that were followed by a backward.
        opaque: no tensor was found in what the last forward returned.
    """

    def __init__(
        self,
        backward_began: Callable[[], object] = bool,
        confirmed: Callable[[Pass], object] = bool,
    ) -> None:
        self.steps = 0
        self.opaque = False
        self._backward_began = backward_began
        self._confirmed = confirmed
        self._backward_seen = False
        self._alive: list[weakref.ref[Pass]] = []
        self._unknown: list[Pass] = []

    def begin(self) -> bool:
        """Called before each forward of a training step.

        Returns:
            Whether a backward was seen since the call before.
        """
        completed, self._backward_seen = self._backward_seen, False
        self.steps += completed
        return completed

    def open(self, *, training: bool = True) -> Pass:
        """A pass begins; it waits from then on, as long as somebody holds it."""
        this_pass = Pass(training=training)
        self._alive.append(weakref.ref(this_pass))
        return this_pass

    def ended(self, output: object, this_pass: Pass | None = None) -> None:
        """Called with what the forward returned, which then holds the pass.

        Where no tensor is found in it, the pass waits until some gradient comes.
        """
        this_pass = this_pass or self.open()
        leaves = list(tensors_in(output))
        for leaf in leaves:
            if leaf.requires_grad and leaf.grad_fn is not None:
                self.hold(this_pass, leaf)
        self.opaque = not leaves
        if not (leaves or this_pass.held):
            self._unknown.append(this_pass)

    def hold(self, this_pass: Pass, tensor: torch.Tensor) -> None:
        """Make the graph of a tensor hold a pass, and tell of its gradient."""
        tensor.register_hook(partial(self._reached, this_pass))
        this_pass.held = True

    def _reached(self, this_pass: Pass, grad: torch.Tensor) -> None:
        del grad
        self.saw_backward()
        this_pass.retained = keeps_graph()
        if not this_pass.backward_seen:
            this_pass.backward_seen = True
            self._backward_began()
            self._confirmed(this_pass)

    def saw_backward(self) -> None:
        """A gradient reached the model, be it not through its output."""
        self._backward_seen = True
        self._unknown.clear()

    @property
    def waiting(self) -> int:
        """Passes whose graph is alive, or not known, and whose backward has not begun."""
        unseen = sum(not x.backward_seen for x in self._living())
        unknown = sum(not x.backward_seen for x in self._unknown)
        return unseen + unknown

    @property
    def retained(self) -> int:
        """Passes whose graph is alive, and was left alive by the backward that came."""
        return sum(x.backward_seen and x.retained for x in self._living())

    def _living(self) -> list[Pass]:
        held = {id(x) for x in self._unknown}
        found = [x for ref in self._alive if (x := ref()) and id(x) not in held]
        self._alive = [weakref.ref(x) for x in found]
        return found
