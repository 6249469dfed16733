"""Copies and pickles of a model that is being tuned come out plain.

While a model is tuned, our hooks hang on it and its candidates have another class. A
copy.deepcopy, torch.save or pickle of it, or of one of its layers, is a model of its own
that nobody tunes: it gets neither, and computes with its own weights.

``copy`` and ``pickle`` ask an object for ``__reduce_ex__``, on the instance first. So the
modules that carry something of ours get one, for as long as they do. It answers for a
twin, which shares the module's attributes and from which ours are taken away.
"""

from __future__ import annotations

import copyreg
import types
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import nn

from fp8tune.errors import ModelError
from fp8tune.model.convert import take_back
from fp8tune.model.experts import where_kept
from fp8tune.model.rerouting import take_routes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "guard_copies",
    "is_guarded",
    "is_ours",
    "plain_twin",
    "refuse_replica",
    "registries_of",
]

_REDUCE = "__reduce_ex__"
_REPLICATE = "_replicate_for_data_parallel"
_OURS = (_REDUCE, _REPLICATE, where_kept)
_REGISTRIES = {name for name in vars(nn.Module()) if "_hooks" in name}


def guard_copies(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Keep ours out of copies of these modules.

    Replicas of nn.DataParallel, which are made in every step, are refused.

    Returns:
        A function that ends it.
    """
    guarded = list(modules)
    for module in guarded:
        vars(module)[_REDUCE] = types.MethodType(_reduce, module)
        vars(module)[_REPLICATE] = types.MethodType(refuse_replica, module)

    def undo() -> None:
        for module in guarded:
            vars(module).pop(_REDUCE, None)
            vars(module).pop(_REPLICATE, None)

    return undo


def is_guarded(module: nn.Module) -> bool:
    """Whether copies of this module are kept clean, since it is being tuned."""
    return _REDUCE in vars(module)


def is_ours(call: object) -> bool:
    """Whether a hook, or what stands in for a forward, is one of fp8tune's."""
    while isinstance(call, partial):
        call = cast("Any", call).func
    home = getattr(call, "__module__", None)
    return isinstance(home, str) and home.startswith("fp8tune.")


def refuse_replica(module: nn.Module) -> NoReturn:
    """Stands in for what nn.DataParallel calls on every module.

    Raises:
        ModelError: always.
    """
    raise ModelError(
        f"nn.DataParallel copies this {type(module).__name__} in every step, and copies "
        "cannot be tuned; use DistributedDataParallel, or give nn.DataParallel the bare "
        "model (auto.module) once the plan is frozen"
    )


def _reduce(module: nn.Module, protocol: int) -> Any:
    twin = plain_twin(module)
    # The class's own, which may be the user's.
    reduction = twin.__reduce_ex__(protocol)
    if type(twin) is type(module) or reduction[0] is not copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue]
        return reduction
    # pickle insists that this function is called with the object's present class.
    _, (kind, *arguments), *rest = reduction
    return kind.__new__, (kind, *arguments), *rest


def plain_twin(module: nn.Module) -> Any:
    """An object that shares a module's attributes, but for ours, and is not converted."""
    twin = object.__new__(type(module))
    vars(twin).update(_without_ours(vars(module)))
    take_back(module, twin)
    take_routes(twin)
    return twin


def registries_of(attributes: Mapping[str, Any]) -> dict[str, dict[int, Any]]:
    """Registries of hooks; the user's own attributes may have such names too."""
    return {k: v for k, v in attributes.items() if k in _REGISTRIES}


def _without_ours(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes; registries of hooks are copied where they hold ours."""
    registries = registries_of(attributes)
    ours = {
        number
        for hooks in registries.values()
        for number, hook in hooks.items()
        if is_ours(hook)
    }
    found = {k: v for k, v in attributes.items() if k not in _OURS}
    for name, hooks in registries.items():
        if ours & hooks.keys():
            kept = ((k, v) for k, v in hooks.items() if k not in ours)
            found[name] = type(hooks)(kept)
    return _with_own_forward(found)


def _with_own_forward(found: dict[str, Any]) -> dict[str, Any]:
    gate = found.get("forward")
    if gate is None or not is_ours(gate):
        return found
    own = getattr(gate, "shadowed", None)
    return {**found, "forward": own} if own else _without(found, "forward")


def _without(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k != name}
