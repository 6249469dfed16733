"""Dynamo's cache while trial plans are compiled side by side."""

import functools
import importlib
import threading
import types
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

__all__ = ["CompiledPlans", "allow_compilations", "compile_without_limit"]

_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
_FAR_AWAY = 1024


class _Compilation(NamedTuple):
    code: types.CodeType
    compiled: types.CodeType
    owner: object


def _config() -> Any:
    return importlib.import_module("torch._dynamo.config")


class _Account:
    """How far Dynamo's limits are raised, for the whole process.

    The first trial raises them and the last one puts them back, in whatever order trials
    begin and end. A limit that somebody else set meanwhile is theirs and stays.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection of garbage may end a trial within
        self._open = 0
        self._base: dict[str, int] = {}

    def enter(self) -> None:
        """A trial begins."""
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._base = {x: getattr(_config(), x) for x in _LIMITS}
                for name, limit in self._base.items():
                    setattr(_config(), name, limit + _FAR_AWAY)

    def leave(self) -> None:
        """A trial ended, or was given up."""
        with self._lock:
            self._open -= 1
            if self._open:
                return
            for name, limit in self._base.items():
                if getattr(_config(), name) == limit + _FAR_AWAY:
                    setattr(_config(), name, limit)

    def allow(self, number: int) -> None:
        """Raise the limits for good, whether or not a trial has raised them too."""
        with self._lock:
            for name in _LIMITS:
                setattr(_config(), name, getattr(_config(), name) + number)
                if name in self._base and self._open:
                    self._base[name] += number


_ACCOUNT = _Account()


def allow_compilations(number: int) -> None:
    """Let each function be compiled so many times more than Dynamo's limits say.

    For the rest of the process, as what was compiled before stays in Dynamo's cache.
    """
    _ACCOUNT.allow(number)


@contextmanager
def compile_without_limit() -> Generator[None]:
    """Compile any number of variants of one function; forget all that is compiled.

    For a process of our own: what else it compiled is forgotten too.
    """
    _ACCOUNT.enter()
    try:
        yield
    finally:
        _ACCOUNT.leave()
        torch.compiler.reset()


class CompiledPlans:
    """What Dynamo compiled while each of several plans was active.

    Each plan that differs inside a compiled region is one more entry in the cache of its
    code object, of which Dynamo allows 8. So the limit is raised while plans are tried,
    and afterwards the code of all but one is let go of and counts no more, which leaves
    the user as many as before.

    Only what is compiled between ``begin_call`` and ``end_call``, in the same thread, is a
    plan's. Dynamo has no public way to let go of single entries; ``torch._dynamo.reset``
    would throw away the user's other compilations too.

    Attributes:
        count: compilations so far.
    """

    def __init__(self) -> None:
        self._compiled: list[_Compilation] = []
        self._active: object = None
        self._thread: int | None = None
        self.count = 0
        _remove_left_hooks()
        note = weakref.WeakMethod(self._note)
        hook = _on_compilation(functools.partial(_call, note))
        _ACCOUNT.enter()
        # Also where a trial is given up with its model and never ends.
        self._stop = weakref.finalize(self, _stop, hook)
        self._stop.atexit = False

    def _note(self, code: types.CodeType, compiled: types.CodeType) -> None:
        if self._thread == threading.get_ident():
            self.count += 1
            self._compiled.append(_Compilation(code, compiled, self._active))

    def activate(self, plan: object) -> None:
        """What the model compiles from now on belongs to this plan."""
        self._active = plan

    def begin_call(self) -> None:
        """The model is called: what is compiled is the active plan's."""
        self._thread = threading.get_ident()

    def end_call(self) -> None:
        """The model returned: what is compiled is the user's own."""
        self._thread = None

    def keep_only(self, plan: object) -> None:
        """Let go of what was compiled for other plans."""
        lost = [x for x in self._compiled if x.owner != plan]
        self._compiled = [x for x in self._compiled if x.owner == plan]
        unwanted: dict[types.CodeType, set[int]] = {}
        for x in lost:
            unwanted.setdefault(x.code, set()).add(id(x.compiled))
        for code, ids in unwanted.items():
            _forget(code, ids)

    def close(self) -> None:
        """Stop watching; the last to close puts the limits back."""
        self._stop()
        _remove_left_hooks()


def _call(method: weakref.WeakMethod[Callable[..., None]], *arguments: Any) -> None:
    found = method()
    if found is not None:
        found(*arguments)


# Of trials that are over; by now they call nothing.
_LEFT_HOOKS: list[RemovableHandle] = []


def _stop(hook: RemovableHandle | None) -> None:
    # Not removed here: a collection of garbage may have called this while Dynamo goes
    # through its hooks, of which none may go away meanwhile.
    if hook is not None:
        _LEFT_HOOKS.append(hook)
    _ACCOUNT.leave()


def _remove_left_hooks() -> None:
    while _LEFT_HOOKS:
        _LEFT_HOOKS.pop().remove()


def _on_compilation(note: Callable[[Any, Any], None]) -> RemovableHandle | None:
    """Call back with (code, compiled code) whenever Dynamo compiled a frame."""
    module = importlib.import_module("torch._dynamo.convert_frame")
    register = getattr(module, "register_bytecode_hook", None)
    return register(note) if register else None


def _forget(code: types.CodeType, unwanted: set[int]) -> None:
    """Empty the cache entries of a code object that hold these compiled codes.

    Where torch does not offer it, they stay.
    """
    frames = importlib.import_module("torch._dynamo.eval_frame")
    guards = importlib.import_module("torch._dynamo.guards")
    listed = getattr(frames, "_debug_get_cache_entry_list", None)
    emptied = getattr(guards, "DeletedGuardManagerWrapper", None)
    if listed is None or emptied is None:
        return
    for entry in [x for x in listed(code) if id(x.code) in unwanted]:
        nothing = emptied("fp8tune: this trial plan lost")
        # An entry made for an object that the frame does not have counts for no
        # recompile_limit; one without any such object counts for every frame.
        nothing.id_matched_objs = {"fp8tune lets go": weakref.ref(_ACCOUNT)}
        entry.guard_manager.extra_state.invalidate(entry, nothing)
