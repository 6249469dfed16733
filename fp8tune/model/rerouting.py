"""Grouped GEMMs of experts led through their handles, inside of the owner's own forward.

The owner gets a subclass of its class, whose forward is the owner's under a function mode
that sees every call of torch. A grouped GEMM whose weight is one of the rerouted Parameters
goes to its handle, which is watched or converted like a Linear; all else runs as it is. So
Parameters stay attributes that FSDP2 may replace, keys stay, and ``torch.compile`` traces
the mode away.
"""

from __future__ import annotations

import copyreg
import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from fp8tune.model.experts import GroupedLinear, where_kept
from fp8tune.model.recomputing import packing_hooks, repeat_within
from fp8tune.model.sharding import rebase, rebase_subclass, to_local

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attach", "detach", "is_rerouted", "stands_in", "take_routes"]

# Casts that an owner may make of its weights before it multiplies; the result is tracked.
_CASTS = (
    torch.Tensor.to,
    torch.Tensor.bfloat16,
    torch.Tensor.half,
    torch.Tensor.float,
    torch.Tensor.type,
    torch.Tensor.type_as,
    torch.Tensor.contiguous,
)

# What a grouped GEMM is called as: torch's function, which F.grouped_mm calls too, and the
# operators that stand in for it where a compiler refuses float32.
_GROUPED: list[Any] = [torch._grouped_mm]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def attach(gemm: nn.Linear, what: str) -> None:
    """From now on the owner's calls of this GEMM go through it.

    Args:
        gemm: the handle, which the owner keeps for so long; of a Linear nothing is done.
        what: for what, such as "watched"; until ``detach`` for all.
    """
    if not isinstance(gemm, GroupedLinear):
        return
    _let_compiled_calls_be_seen()
    gemm.holds.add(what)
    vars(gemm.owner).setdefault(where_kept, {})[gemm.parameter] = gemm
    if not is_rerouted(gemm.owner):
        gemm.owner.__class__ = _rerouted(type(gemm.owner))


def detach(gemm: nn.Linear, what: str) -> None:
    """Undo ``attach``; after the last of them the owner's class is what it was."""
    if not isinstance(gemm, GroupedLinear):
        return
    gemm.holds.discard(what)
    routes = vars(gemm.owner).get(where_kept, {})
    if gemm.holds or routes.get(gemm.parameter) is not gemm:
        return
    del routes[gemm.parameter]
    if not routes:
        take_routes(gemm.owner)


def is_rerouted(owner: nn.Module) -> bool:
    """Whether some GEMM of the module goes through its handle."""
    return isinstance(owner, _Rerouted)


def take_routes(owner: Any) -> None:
    """Take the class and the handles away from a module of experts, or from its twin."""
    vars(owner).pop(where_kept, None)
    kind = _last_rerouted(type(owner))
    if kind is None:
        return
    found = type(owner)
    plain = rebase(found, kind, kind.plain) or rebase_subclass(found, kind, kind.plain)
    if plain is not None:
        owner.__class__ = plain


def _last_rerouted(kind: type) -> Any:
    return next(
        (x for x in kind.__mro__ if "plain" in vars(x) and issubclass(x, _Rerouted)),
        None,
    )


class _Rerouted:
    """Marks the classes that ``_rerouted`` makes; ``plain`` is what each was made of."""

    plain: type[nn.Module]


@functools.cache
def _rerouted(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class, under the same name."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Mode(self):
            return kind.forward(self, *args, **kwargs)

    own = {
        "forward": forward,
        "plain": kind,
        "__reduce_ex__": _reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (kind, _Rerouted), own)


def _reduce(self: Any, protocol: int) -> Any:
    """As pickle would do it, which finds a class by its name only."""
    kind = type(self).plain
    reduction = kind.__reduce_ex__(self, protocol)
    if reduction[0] is not copyreg.__newobj__ or reduction[1][0] is not type(self):  # pyright: ignore[reportAttributeAccessIssue]
        return reduction
    return _new, (kind,), *reduction[2:]


def _new(kind: type[nn.Module]) -> nn.Module:
    _let_compiled_calls_be_seen()
    made = _rerouted(kind)
    return made.__new__(made)


class _Mode(TorchFunctionMode):
    """Sends grouped GEMMs to their handles.

    Args:
        owner: the module whose forward is about to run.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = owner
        self.packing = packing_hooks()
        routes: dict[str, GroupedLinear] = owner.__dict__.get(where_kept, {})
        self.known = [(getattr(owner, name), x) for name, x in routes.items()]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            result = func(*args, **kwargs)
            gemm = self._gemm_of(args[0])
            if gemm is not None:
                self.known.append((result, gemm))
            return result
        if func in _GROUPED and len(args) > 1 and isinstance(args[1], torch.Tensor):
            gemm = self._gemm_of(args[1])
            offs = args[2] if len(args) > 2 else kwargs.get("offs")
            plain = kwargs.get("bias") is None and kwargs.get("out_dtype") is None
            if gemm is not None and offs is not None and plain and len(args) <= 3:
                repeat_within(self.packing, functools.partial(_Mode, self.owner))
                return gemm(args[0], args[1], offs, func)
        return func(*args, **kwargs)

    def _gemm_of(self, tensor: Any) -> GroupedLinear | None:
        """The handle of the Parameter that a tensor is, is a view of, or was cast from."""
        for weight, gemm in self.known:
            if tensor is weight or tensor._base is weight:  # noqa: SLF001
                return gemm
        if torch.compiler.is_compiling():
            return None
        for weight, gemm in self.known:
            if _is_same_memory(tensor, weight):
                return gemm
        return None


def _is_same_memory(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether it is all of a weight, or of the part of it that is on this rank."""
    local = to_local(weight) if isinstance(weight, DTensor) else weight
    if isinstance(tensor, DTensor) or tensor.numel() != local.numel():
        return False
    if isinstance(tensor, FakeTensor) or isinstance(local, FakeTensor):
        # Of these only the storage tells them from one another.
        mine, others = tensor.untyped_storage(), local.untyped_storage()
        return StorageWeakRef(mine) == StorageWeakRef(others)
    same = tensor.data_ptr() == local.data_ptr()
    return same and tensor.numel() > 0 and tensor.device == local.device


@functools.cache
def _overridable() -> set[Callable[..., Any]] | None:
    """What Dynamo asks function modes about, if this torch has the list."""
    # Imported where it is needed: it takes seconds.
    from torch._dynamo.variables import torch as of_dynamo  # noqa: PLC0415

    listed = getattr(of_dynamo, "get_overridable_functions", None)
    return cast("set[Callable[..., Any]]", listed()) if listed else None


def _let_compiled_calls_be_seen() -> None:
    """Dynamo passes the grouped GEMM by the function modes unless it stands in its list.

    Rerouting would then silently do nothing in what is compiled. torch has no public
    place for this.
    """
    listed = _overridable()
    if listed is not None:
        listed.add(_GROUPED[0])
    # Transformers' operator, since its version 5, where it is loaded.
    operator = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if operator is not None:
        stands_in(operator)


def stands_in(operator: Any) -> None:
    """From now on calls of this operator are grouped GEMMs too.

    Args:
        operator: a custom one of torch's, called with input, weight and offs.
    """
    if operator not in _GROUPED:
        _GROUPED.extend([operator, operator.default])
