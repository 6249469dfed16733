"""Where training enters the model: its forward, or layers that another method calls.

``encode_image``, ``loss``, a part of the model that a trainer calls, the bare model where
it was wrapped: all of them reach the candidates. So the candidates' own calls are watched
beside the model's. A call is watched from around it, by the place that torch keeps for
``module.compile()``: hooks come too late for a freeze, since the forward of a layer is
looked up before its hooks run, and copies and pickles leave that place out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.model.experts import home_of
from fp8tune.model.flops import FlopCount
from fp8tune.model.graph_capture import GraphCapture
from fp8tune.model.passes import Pass, Passes, in_backward
from fp8tune.model.rerouting import attach, detach
from fp8tune.model.tracing import refuse_compiling
from fp8tune.model.transforms import under_transform

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

__all__ = ["Entrances", "set_call"]

# Why the calls of a grouped GEMM are led through it; see ``fp8tune.model.rerouting``.
_WATCHED = "watched"


class Entrances:
    """Tells when passes of training begin, and which one is under way.

    Args:
        module: the model.
        linears: its layers that are watched, by name.
        passes: gets what the passes return.
        began: called before each pass; may call ``close``.
        transformed: called with the name of a layer before it runs under torch.func.

    Attributes:
        elsewhere: passes that began outside of the model's forward.
        forwards: the others.
        counting: whether the matrix products of forwards are to be counted.
    """

    def __init__(
        self,
        module: nn.Module,
        linears: Mapping[str, nn.Linear],
        passes: Passes,
        began: Callable[[], object],
        transformed: Callable[[str], object] = bool,
    ) -> None:
        self._module = module
        self._linears = dict(linears)
        self._passes = passes
        self._began = began
        self._transformed = transformed
        self._inside = False
        self._forward: Pass | None = None
        self._run: Pass | None = None
        self._called: set[str] = set()
        self._recomputed = False
        self._direct = False
        self._graph = GraphCapture()
        self._flops = FlopCount()
        self.counting = False
        self.elsewhere = 0
        self.forwards = 0
        for fqn, linear in self._linears.items():
            attach(linear, _WATCHED)
            set_call(linear, partial(self._call_layer, fqn, linear))
        self._handles = [
            module.register_forward_pre_hook(self._forward_begins),
            module.register_forward_hook(self._forward_ended, always_call=True),
        ]

    def close(self) -> None:
        """Take everything away from the model."""
        for handle in self._handles:
            handle.remove()
        for linear in self._linears.values():
            set_call(linear, None)
            detach(linear, _WATCHED)
        self._flops.end()
        self._handles.clear()
        self._linears.clear()
        self._forward = None
        # No circle through whoever watches is left to the collector.
        self._began = self._transformed = bool

    def current(self) -> Pass | None:
        """The pass that a call of a layer belongs to, if it trains."""
        if self._inside or not torch.is_grad_enabled():
            return self._forward
        return self._run

    def saw_gradient(self, *, recomputed: bool) -> None:
        """Called when a gradient reaches the model, or a layer that backward recomputed."""
        self._recomputed = self._recomputed or recomputed
        self._direct = self._direct or not recomputed
        self.end_run()

    def end_run(self) -> None:
        """Calls outside of the model's forward belong to another pass from here on."""
        self._run = None
        self._called.clear()

    def _forward_begins(self, module: nn.Module, args: object) -> None:
        del module, args
        if torch.compiler.is_compiling():
            refuse_compiling()
        if in_backward():  # the model itself is being recomputed
            return
        self._inside = True
        self.end_run()
        if self._forward_trains():
            self.forwards += 1
            self._began()
            self._forward = self._open()
            if self._forward and self.counting:
                self._forward.products = self._flops.begin()

    def _forward_ended(self, module: nn.Module, args: object, output: object) -> None:
        del module, args
        if in_backward():
            return
        self._flops.end()
        if self._forward:
            self._passes.ended(output, self._forward)
        self._inside, self._forward = False, None

    def _call_layer(
        self, fqn: str, linear: nn.Linear, *args: Any, **kwargs: Any
    ) -> Any:
        if not (self._inside or in_backward()) and self._layer_trains(linear):
            self._layer_begins(fqn)
        if under_transform() and not in_backward():
            self._transformed(fqn)
        # What is called may be another class by now.
        call: Any = linear._call_impl if self._handles else linear  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return self._flops.in_candidate(partial(call, *args, **kwargs))

    def _layer_begins(self, fqn: str) -> None:
        """A run of calls ends with a gradient, and before a layer that it called already."""
        if not self._called or fqn in self._called:
            self.end_run()
            self.elsewhere += 1
            self._began()
            self._run = self._open()
        self._called.add(fqn)

    def _open(self) -> Pass | None:
        if not self._handles or not torch.is_grad_enabled():
            return None
        return self._passes.open(training=self._module.training)

    def _forward_trains(self) -> bool:
        """Whether a forward of the model may belong to training.

        Reentrant checkpointing of the whole model calls it without gradients first; an
        evaluation does so too, but in eval mode.
        """
        if self._graph.is_under_way():
            return False
        whole = self._recomputed and not self._direct
        return torch.is_grad_enabled() or (whole and self._module.training)

    def _layer_trains(self, linear: nn.Linear) -> bool:
        if self._graph.is_under_way():
            return False
        return torch.is_grad_enabled() or (
            self._recomputed and home_of(linear).training
        )


def set_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """What is run in place of a module's own call; None is that call.

    torch has no public place for it.
    """
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        module._compiled_call_impl = call  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
