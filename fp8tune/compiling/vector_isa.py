"""What Inductor has to know of a CPU before it compiles for it, asked while it is imported.

For each instruction set that the CPU lists Inductor builds a small library and loads it in
a process of its own, one set after the other, all in the first compilation: seconds of the
C++ compiler with an empty cache, tenths of a second with a full one. The sets need not wait
for each other, nor for Python's imports.
"""

from __future__ import annotations

import functools
import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = ["listed_by_cpu", "prepare_inductor"]

logger = logging.getLogger("fp8tune")

_INDUCTOR = "inductor"
_SETS = "torch._inductor.cpu_vec_isa"
# Whatever the threads import must be there before they begin, since two threads that
# import modules which need each other may find them half made.
_BEFORE = ("torch._inductor.codecache", "torch._inductor.cpp_builder", _SETS)


def prepare_inductor(options: Mapping[str, Any], device: torch.device) -> None:
    """Make ready what the first compilation of a process would wait for.

    Args:
        options: keyword arguments of torch.compile; without Inductor nothing is done.
        device: where the compiled code will run; only CPUs have something to prepare.
    """
    if device.type == "cpu" and options.get("backend", _INDUCTOR) == _INDUCTOR:
        _try_instruction_sets()


@functools.cache
def _try_instruction_sets() -> None:
    """Side by side, while the rest of Inductor is imported; Inductor keeps the answers."""
    for name in _BEFORE:
        importlib.import_module(name)
    listed = listed_by_cpu()
    with ThreadPoolExecutor(max(1, len(listed)), "fp8tune") as threads:
        answers = [threads.submit(bool, x) for x in listed]
        importlib.import_module("torch._inductor.compile_fx")
    for error in filter(None, (x.exception() for x in answers)):
        # Such as no compiler. Whoever needs the answer asks again, and is told.
        logger.debug("trying an instruction set failed", exc_info=error)


def listed_by_cpu() -> list[Any]:
    """The instruction sets that Inductor would try; none where torch does not tell them."""
    module = importlib.import_module(_SETS)
    flags = set(getattr(module, "x86_isa_checker", list)())
    known = getattr(module, "supported_vec_isa_list", ())
    return [x for x in known if flags and set(str(x).split()) <= flags]
