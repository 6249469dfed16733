"""Dynamo's cache while trial plans are compiled side by side."""

import functools
import importlib
import types
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["CompiledPlans", "compile_without_limit"]

_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_FAR_AWAY = 1024


class _Compilation(NamedTuple):
    code: types.CodeType
    compiled: types.CodeType
    owner: object


def _config() -> Any:
    return importlib.import_module("torch._dynamo.config")


@contextmanager
def compile_without_limit() -> Generator[None]:
    """Compile any number of variants of one function; forget all that is compiled.

    For a process of our own: what else it compiled is forgotten too.
    """
    with _config().patch(dict.fromkeys(_LIMITS, _FAR_AWAY)):
        try:
            yield
        finally:
            torch.compiler.reset()


class CompiledPlans:
    """What Dynamo compiled while each of several plans was active.

    Each plan that differs inside a compiled region is one more entry in the cache of its
    code object, of which Dynamo allows 8. So the limit is raised while plans are tried,
    and afterwards the code of all but one is let go of. Emptied entries still count, so
    the limit stays raised by their number, which leaves the user as many as before.

    Dynamo has no public way to let go of single entries; ``torch._dynamo.reset`` would
    throw away the user's other compilations too.

    Attributes:
        count: compilations so far.
    """

    def __init__(self) -> None:
        self._limits = {x: getattr(_config(), x) for x in _LIMITS}
        self._compiled: list[_Compilation] = []
        self._active: object = None
        self._emptied = 0
        self._raise_limits(_FAR_AWAY)
        self.count = 0
        note = weakref.WeakMethod(self._note)
        hook = _on_compilation(functools.partial(_call, note))
        # Also where a trial is given up with its model and never ends.
        self._stop = weakref.finalize(self, _stop, hook, dict(self._limits))
        self._stop.atexit = False

    def _raise_limits(self, by: int) -> None:
        _set_limits({name: limit + by for name, limit in self._limits.items()})

    def _note(self, code: types.CodeType, compiled: types.CodeType) -> None:
        self.count += 1
        self._compiled.append(_Compilation(code, compiled, self._active))

    def activate(self, plan: object) -> None:
        """What is compiled from now on belongs to this plan."""
        self._active = plan

    def keep_only(self, plan: object) -> None:
        """Let go of what was compiled for other plans."""
        lost = [x for x in self._compiled if x.owner != plan]
        self._compiled = [x for x in self._compiled if x.owner == plan]
        unwanted: dict[types.CodeType, set[int]] = {}
        for x in lost:
            unwanted.setdefault(x.code, set()).add(id(x.compiled))
        emptied = [_forget(code, ids) for code, ids in unwanted.items()]
        self._emptied = max([self._emptied, *emptied])

    def close(self) -> None:
        """Stop watching; leave room for as many entries as the user had."""
        self._stop()
        self._raise_limits(self._emptied)


def _call(method: weakref.WeakMethod[Callable[..., None]], *arguments: Any) -> None:
    found = method()
    if found is not None:
        found(*arguments)


def _stop(hook: RemovableHandle | None, limits: Mapping[str, int]) -> None:
    if hook is not None:
        hook.remove()
    _set_limits(limits)


def _set_limits(limits: Mapping[str, int]) -> None:
    for name, limit in limits.items():
        setattr(_config(), name, limit)


def _on_compilation(note: Callable[[Any, Any], None]) -> RemovableHandle | None:
    """Call back with (code, compiled code) whenever Dynamo compiled a frame."""
    module = importlib.import_module("torch._dynamo.convert_frame")
    register = getattr(module, "register_bytecode_hook", None)
    return register(note) if register else None


def _forget(code: types.CodeType, unwanted: set[int]) -> int:
    """Empty the cache entries of a code object that hold these compiled codes.

    Returns:
        How many were emptied; 0 where torch does not offer it.
    """
    frames = importlib.import_module("torch._dynamo.eval_frame")
    guards = importlib.import_module("torch._dynamo.guards")
    listed = getattr(frames, "_debug_get_cache_entry_list", None)
    emptied = getattr(guards, "DeletedGuardManagerWrapper", None)
    if listed is None or emptied is None:
        return 0
    entries = [x for x in listed(code) if id(x.code) in unwanted]
    for entry in entries:
        reason = "fp8tune: this trial plan lost"
        entry.guard_manager.extra_state.invalidate(entry, emptied(reason))
    return len(entries)
