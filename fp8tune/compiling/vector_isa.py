"""Inductor made ready for a CPU: its imports, and which instruction set it compiles for.

For each set that the CPU lists Inductor builds a small library and loads it in a process of
its own, one set after the other, though it uses the first that works: seconds of the C++
compiler with an empty cache, tenths of a second with a full one. The first is tried while
Python imports the rest of Inductor. Where it works, so do those that it contains.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fp8tune.garbage import no_collection

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["listed_by_cpu", "prepare_inductor"]

logger = logging.getLogger("fp8tune")

_INDUCTOR = "inductor"
_SETS = "torch._inductor.cpu_vec_isa"
# Whatever the thread imports must be there before it begins, since two threads that
# import modules which need each other may find them half made.
_BEFORE = ("torch._inductor.codecache", "torch._inductor.cpp_builder", _SETS)


def prepare_inductor(options: Mapping[str, Any], device: torch.device) -> None:
    """Make ready what the first compilation of a process would wait for.

    Args:
        options: keyword arguments of torch.compile; without Inductor nothing is done.
        device: where the compiled code will run; only CPUs have something to prepare.
    """
    if device.type == "cpu" and options.get("backend", _INDUCTOR) == _INDUCTOR:
        _import_and_try_first_set()


@functools.cache
def _import_and_try_first_set() -> None:
    # The imports make so many objects that a third of their time would go to collections.
    with no_collection():
        for name in _BEFORE:
            importlib.import_module(name)
        with ThreadPoolExecutor(1, "fp8tune") as thread:
            works = thread.submit(_first_set_works)
            importlib.import_module("torch._inductor.compile_fx")
    try:
        if works.result():
            _take_other_sets_for_granted()
    except Exception as error:
        # Such as no compiler. Whoever needs the answer asks again, and is told.
        logger.debug("trying an instruction set failed", exc_info=error)


def _first_set_works() -> bool:
    return _first_is_used() and any(map(bool, listed_by_cpu()[:1]))


def _first_is_used() -> bool:
    """Not where somebody asked for a set by its width or its name."""
    config = importlib.import_module("torch._inductor.config")
    return config.cpp.simdlen is None and "ATEN_CPU_CAPABILITY" not in os.environ


def _take_other_sets_for_granted() -> None:
    """Inductor keeps the list that it makes now."""
    config = importlib.import_module("torch._inductor.config")
    with config.patch({"cpp.vec_isa_ok": True}):
        importlib.import_module(_SETS).valid_vec_isa_list()


def listed_by_cpu() -> list[Any]:
    """The sets that Inductor would try, first first; none where torch does not tell them."""
    module = importlib.import_module(_SETS)
    flags = set(getattr(module, "x86_isa_checker", list)())
    known = getattr(module, "supported_vec_isa_list", ())
    return [x for x in known if flags and set(str(x).split()) <= flags]
