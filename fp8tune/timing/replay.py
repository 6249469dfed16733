"""A signature made runnable: forward + backward on the captured tensors.

Both variants share one set of operands and run the same few lines; they differ only in
the class of a stand-in Linear that borrows the real layer's weight. Nothing of the
user's model is called: gradients are returned, never accumulated, and the compiled
variant lives in a function of its own.
"""

from __future__ import annotations

import types
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.compiling.cuda_graphs import without_cuda_graphs
from fp8tune.compiling.vector_isa import prepare_inductor
from fp8tune.config import Context
from fp8tune.decision.records import REFERENCE, Shape
from fp8tune.model.experts import stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fp8tune.decision.records import Signature
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Work
    from fp8tune.timing.operands import Operands

    Body = Callable[[nn.Linear, torch.Tensor], torch.Tensor]
    # By signature and variant. Dynamo's guards hold for every stand-in of a signature, so
    # what was compiled for one of them runs with the tensors of the next.
    CompiledBodies = dict[tuple[Signature, str], Body]

__all__ = ["Replay", "Results"]


class Results(NamedTuple):
    """What one forward + backward computed; None where training needs no gradient."""

    output: torch.Tensor
    grad_input: torch.Tensor | None
    grad_weight: torch.Tensor | None


class Replay:
    """One variant of a signature as ``Work`` for a clock.

    Args:
        operands: what to run on, shared with the other variant.
        recipe: what the Linear is converted to; None is the reference.
        compile_options: keyword arguments of torch.compile, or None for eager.
        context: what surrounds the Linear while it is timed.
        compiled: functions that were compiled before, and those compiled now.

    Attributes:
        ran: whether any clock has really run it; a scripted one never does.
    """

    def __init__(
        self,
        operands: Operands,
        recipe: Recipe | None,
        compile_options: Mapping[str, Any] | None,
        context: Context = Context.LINEAR,
        compiled: CompiledBodies | None = None,
    ) -> None:
        self.signature = operands.sample.signature
        self.variant = recipe.name if recipe else REFERENCE
        self.operands = operands
        self.recipe = recipe
        self.ran = False
        self._compile_options = compile_options
        self._body = _IN_CONTEXT[context]
        self._compiled = {} if compiled is None else compiled

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.operands.device

    def __call__(self) -> None:
        """Forward, again if it is recomputed, then the backward that training needs."""
        self.run()

    def run(self, routing: int = 0) -> None:
        """The same with another routing of the operands."""
        self.ran = True
        self._route(routing)
        self._run(self._forward)

    @property
    def works(self) -> list[Work]:
        """What is timed: itself, or once with each routing."""
        number = len(self.operands.routings)
        return [self, *(_Routed(self, i) for i in range(1, number))]

    def results(self) -> Results:
        """What the bare Linear computes; eagerly where it is timed in a context."""
        self._route(0)
        output, gradients = self._run(self._forward if self._body is _call else _call)
        found = dict(zip(map(id, self._differentiated), gradients, strict=True))
        return Results(
            output.detach(),
            found.get(id(self.operands.input)),
            found.get(id(self._linear.weight)),
        )

    def _run(self, forward: Body) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        with self._autocast():
            output = forward(self._linear, self.operands.input)
            if self.signature.recompute:
                output = forward(self._linear, self.operands.input)
        if not self._differentiated:
            return output, ()
        grad_output = self.operands.grad_output(output)
        return output, torch.autograd.grad(output, self._differentiated, grad_output)

    def _autocast(self) -> torch.autocast:
        # As it was around the layer. Its cache is off, since a cached cast of the weight
        # would be timed once instead of every time, and would stay in the user's cache.
        name = self.signature.shape.autocast_dtype
        return torch.autocast(
            self.operands.device.type,
            dtype=getattr(torch, name) if name else None,
            enabled=name is not None,
            cache_enabled=False,
        )

    @cached_property
    def _linear(self) -> nn.Linear:
        signature, operands = self.signature, self.operands
        shape = signature.shape
        if shape.experts:
            weight = nn.Parameter(operands.weight, signature.grad_weight)
            return self._experts(weight)
        linear = nn.Linear(shape.k, shape.n, bias=shape.bias, device="meta")
        linear.weight = nn.Parameter(operands.weight, signature.grad_weight)
        if shape.bias:
            linear.bias = nn.Parameter(operands.bias, signature.grad_bias)
        if self.recipe:
            self.recipe.convert(linear)
        return linear

    def _experts(self, weight: nn.Parameter) -> Any:
        """The stand-in of a module of experts, which is called like a Linear."""
        transposed = self.signature.shape.transposed
        gemm = stand_in(weight, self.operands.offs, transposed=transposed)
        if self.recipe:
            self.recipe.convert(gemm)
        return gemm.owner

    def _route(self, routing: int) -> None:
        if self.operands.routings:
            linear: Any = self._linear
            linear.offs = self.operands.routings[routing]

    @cached_property
    def _differentiated(self) -> list[torch.Tensor]:
        signature, linear = self.signature, self._linear
        wanted = [
            (signature.grad_input, self.operands.input),
            (signature.grad_weight, linear.weight),
            (signature.grad_bias, linear.bias),
        ]
        return [tensor for needed, tensor in wanted if needed]

    @cached_property
    def _forward(self) -> Body:
        if self._compile_options is None or self._is_opaque:
            return self._body
        key = self.signature, self.variant
        if key not in self._compiled:
            self._compiled[key] = self._compile(self._compile_options)
        return self._compiled[key]

    def _compile(self, options: Mapping[str, Any]) -> Body:
        plain: dict[str, Any] = {"dynamic": False, **without_cuda_graphs(options)}
        prepare_inductor(plain, self.device)
        return torch.compile(_own_function(self._body, self.signature.shape), **plain)

    @property
    def _is_opaque(self) -> bool:
        """Whether the compiler takes it for one call, or refuses it, as grouped float32."""
        shape = self.signature.shape
        plain = self.recipe is None and shape.input_dtype != "bfloat16"
        return bool(shape.experts) and plain


class _Routed:
    """A variant with one more of its routings, as work of its own."""

    def __init__(self, replay: Replay, routing: int) -> None:
        self.signature, self.variant = replay.signature, replay.variant
        self._replay, self._routing = replay, routing

    def __call__(self) -> None:
        """See ``Replay.run``."""
        self._replay.run(self._routing)


def _call(linear: nn.Linear, tensor: torch.Tensor) -> torch.Tensor:
    # Hooks that are set on all modules, as by FlopCounterMode, are for the user's.
    return linear(tensor) if _has_hooks(linear) else linear.forward(tensor)


def _has_hooks(linear: nn.Linear) -> bool:
    """Whether the recipe set hooks on it."""
    own = vars(linear)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def _call_between_norm_and_act(linear: nn.Linear, tensor: torch.Tensor) -> torch.Tensor:
    return F.silu(_call(linear, F.rms_norm(tensor, tensor.shape[-1:])))


_IN_CONTEXT = {
    Context.LINEAR: _call,
    Context.NORM_ACT: _call_between_norm_and_act,
}


def _own_function(body: types.FunctionType, shape: Shape) -> Body:
    """A copy of the body with a code object and a name of its own.

    Dynamo keeps compiled code and its recompile limit by code object, and learns dynamic
    shapes by the function's name and place; sharing either would let one signature
    disturb another.
    """
    name = f"fp8tune_m{shape.m}_k{shape.k}_n{shape.n}"
    code = body.__code__.replace(co_name=name)
    return types.FunctionType(code, body.__globals__, name)
