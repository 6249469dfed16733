"""Inductor made ready for a CPU: its imports, and the instruction sets it may compile for.

For each set that the CPU lists Inductor builds a small library and loads it in a process of
its own, one after the other: seconds of the C++ compiler with an empty cache, tenths of a
second with a full one. That is to find out whether torch was built for the set and the CPU
runs it, both of which torch tells: its own kernels use it. What extends such a set, as VNNI
and AMX, has still to be built, which tells of the compiler; loading it tells nothing more,
since it needs nothing but instructions that the CPU lists.
"""

from __future__ import annotations

import functools
import importlib
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.garbage import no_collection

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

__all__ = ["listed_by_cpu", "prepare_inductor"]

logger = logging.getLogger("fp8tune")

_INDUCTOR = "inductor"
_SETS = "torch._inductor.cpu_vec_isa"
_LOAD = "_probe_load"


def prepare_inductor(options: Mapping[str, Any], device: torch.device) -> None:
    """Make ready what the first compilation of a process would wait for.

    Args:
        options: keyword arguments of torch.compile; without Inductor nothing is done.
        device: where the compiled code will run; only CPUs have something to prepare.
    """
    if device.type == "cpu" and options.get("backend", _INDUCTOR) == _INDUCTOR:
        _import_and_list_sets()


@functools.cache
def _import_and_list_sets() -> None:
    # The imports make so many objects that a third of their time would go to collections.
    with no_collection():
        importlib.import_module("torch._inductor.compile_fx")
    try:
        if any(map(_torch_runs_with, listed_by_cpu()[:1])):
            _list_sets_untried()
    except Exception as error:
        logger.debug("taking instruction sets for granted failed", exc_info=error)


def listed_by_cpu() -> list[Any]:
    """The sets that Inductor would try, best first; none where torch does not tell them."""
    module = importlib.import_module(_SETS)
    flags = set(getattr(module, "x86_isa_checker", list)())
    known = getattr(module, "supported_vec_isa_list", ())
    return [x for x in known if flags and set(str(x).split()) <= flags]


def _torch_runs_with(best: Any) -> bool:
    """Not where the user set ATEN_CPU_CAPABILITY to less."""
    return torch.backends.cpu.get_cpu_capability().lower() in str(best).split()


def _list_sets_untried() -> None:
    """Inductor keeps the list that it makes now, unless the user said what holds."""
    config = importlib.import_module("torch._inductor.config")
    if config.cpp.vec_isa_ok is None:
        module = importlib.import_module(_SETS)
        with config.patch({"cpp.vec_isa_ok": True}), _built_is_loadable(module.VecISA):
            module.valid_vec_isa_list()


@contextmanager
def _built_is_loadable(kind: Any) -> Generator[None]:
    """Older torch loads in the function that builds, where it cannot be left out."""
    load = vars(kind).get(_LOAD)
    if load:
        setattr(kind, _LOAD, _loads)
    try:
        yield
    finally:
        if load:
            setattr(kind, _LOAD, load)


def _loads(_set: object, _path: str) -> bool:
    return True
