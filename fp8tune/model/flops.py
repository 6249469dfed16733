"""FLOPs of the matrix products in one forward, by torch's formulas, and of its backward.

A dispatch mode looks at what a forward of the model calls, from its first hook to its
last. It changes nothing: what the user compiled runs compiled, subclasses of tensors and
other modes get their calls as before. Of backward it sees nothing, since user code lies
between, and since backward may run on another thread; so backward is counted from the
forward: as much again for each operand of a product that takes a gradient, and 2.5 times
as much for fused attention, which repeats one product of its forward.

Calls of candidates are left out here; their signatures say what they cost.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from fp8tune.decision.coverage import EXPERTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fp8tune.decision.records import Signature

__all__ = ["FlopCount", "Product", "flops_of", "total_of"]

_ATEN = torch.ops.aten

# torch's own counter knows no formula for these two.
_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")

# The two factors stand behind the summand there.
_WITH_SUMMAND = ("addmm", "baddbmm")

# Weights of lazy modules before their first forward compute nothing by themselves.
_PLAIN = (torch.Tensor, nn.Parameter, UninitializedParameter, UninitializedBuffer)

_BATCHED = ("bmm", "baddbmm")

_ATTENTION_BACKWARD = 2.5

# Dimensions of a Parameter that holds one matrix for each expert.
_STACKED = 3


class Product(NamedTuple):
    """One matrix product that is no candidate's.

    Attributes:
        what: where it belongs, in words.
        forward: its FLOPs.
        backward: those of its backward, as far as forward tells.
        repeated: those if this was the forward of a checkpointed part, which runs
            without gradients and is repeated with them.
    """

    what: str
    forward: int
    backward: int
    repeated: int


class FlopCount:
    """Counts while it is between ``begin`` and ``end``."""

    def __init__(self) -> None:
        self._mode: _Mode | None = None

    def begin(self) -> list[Product]:
        """Start; the list is filled until ``end``."""
        self.end()
        self._mode = _Mode()
        self._mode.__enter__()
        return self._mode.products

    def end(self) -> None:
        """Stop, if it was counting."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)

    def in_candidate(self, call: Callable[[], Any]) -> Any:
        """The call of a candidate, of which nothing is counted."""
        mode = self._mode
        if mode is None:
            return call()
        mode.depth += 1
        try:
            return call()
        finally:
            mode.depth -= 1


class _Mode(TorchDispatchMode):
    # torch refuses its higher-order operators under a mode that does not say so.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.depth = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: torch.compile would run nothing compiled under any other."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, for the same reason."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Nothing runs: DTensor asks for the shape of a whole result in this way.
        if FakeTensor in types:
            return func(*args, **(kwargs or {}))
        # Another subclass, such as DTensor, comes back with what it computes with.
        subclasses = [x for x in types if x not in _PLAIN]
        if subclasses and isinstance(func, torch._ops.OpOverload):  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            return NotImplemented
        found = func(*args, **(kwargs or {}))
        if self.depth == 0:
            self._look_at(func, args, kwargs or {}, found)
        return found

    def _look_at(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        packet = getattr(func, "_overloadpacket", func)
        name = _name_of(packet)
        if name == _CPU_ATTENTION:
            flops = sdpa_flop(*args, **kwargs, out_val=out)
        elif name in _GROUPED:
            flops = _grouped_flops(*args[:2])
        elif packet in flop_registry and "backward" not in name:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            return
        self.products.append(_product(name, args, int(flops)))


def _name_of(packet: Any) -> str:
    return str(getattr(packet, "__name__", packet))


def _grouped_flops(a: torch.Tensor, b: torch.Tensor) -> int:
    """2-D rows by 3-D weights: each row meets one expert; other forms likewise."""
    both_3d = a.dim() == b.dim() == 3
    rows = a.shape[-2] * (a.shape[0] if both_3d else 1)
    return 2 * rows * a.shape[-1] * b.shape[-1]


def _product(name: str, args: Any, flops: int) -> Product:
    fused = _is_attention(name)
    start = 1 if name in _WITH_SUMMAND else 0
    factors = [x for x in args[start : start + 2] if isinstance(x, torch.Tensor)]
    taking = sum(x.requires_grad for x in factors)
    whole = int(flops * _ATTENTION_BACKWARD) if fused else 2 * flops
    backward = (whole if taking else 0) if fused else taking * flops
    # Parameters alone take gradients where gradients are off; what follows takes them too.
    hidden = not torch.is_grad_enabled() and taking > 0
    return Product(_what(name), flops, backward, whole if hidden else backward)


def _is_attention(name: str) -> bool:
    """Whether one call is the whole of an attention."""
    return "attention" in name


def _what(name: str) -> str:
    if _is_attention(name):
        return "attention"
    if "convolution" in name:
        return "convolutions"
    if name in _GROUPED:
        return EXPERTS
    module = next(_modules_on_the_stack(), None)
    if module is None:
        return "functions outside of modules"
    return _of_module(module, name)


def _of_module(module: nn.Module, name: str) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return "Linears left out"
    if any(x.dim() == _STACKED for x in module.parameters(recurse=False)):
        return EXPERTS
    # Batches of products of activations: attention that is written out.
    if name in _BATCHED and "attention" in kind.lower():
        return "attention"
    return kind


def _modules_on_the_stack() -> Iterator[nn.Module]:
    """The modules whose methods are running, the innermost first."""
    frame = sys._getframe(1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        found = frame.f_locals.get("self")
        # A compiled function's graph is a module too, and no part of the model.
        if isinstance(found, nn.Module) and not isinstance(found, GraphModule):
            yield found
        frame = frame.f_back


def total_of(products: list[Product], *, repeated: bool) -> Counter[str]:
    """FLOPs of forward and backward by where they belong.

    Args:
        products: what was counted.
        repeated: whether parts of the model are checkpointed so that their first forward
            runs without gradients.
    """
    total: Counter[str] = Counter()
    for x in products:
        total[x.what] += x.forward + (x.repeated if repeated else x.backward)
    return total


def flops_of(signature: Signature) -> int:
    """Of forward and backward of one call: 2 * M * K * N for each product.

    A product that activation checkpointing repeats counts once.
    """
    shape = signature.shape
    products = 1 + signature.grad_input + signature.grad_weight
    return 2 * shape.m * shape.k * shape.n * products
