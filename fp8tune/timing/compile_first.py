"""Compiling a signature before any is timed, where several ranks share them.

While one rank compiles it takes cores and memory from another that times, whose rounds then
go on until their budget is spent. So ranks compile at the same time and time at the same
time. Each begins with other signatures, and finds what another compiled in Inductor's
cache. What is compiled stays, without its tensors, and is timed without another trace.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.garbage import no_collection
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.model.candidates import Sample
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock, Work
    from fp8tune.timing.replay import CompiledBodies

__all__ = ["compile_variants"]

logger = logging.getLogger("fp8tune")


def compile_variants(
    take: Callable[[], Sample],
    recipes: Sequence[Recipe],
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any],
    *,
    compiled: CompiledBodies,
) -> None:
    """Run the reference and each candidate once.

    What fails is logged at DEBUG: it fails again where it is timed, which says so.

    Args:
        take: returns the signature with the tensors it was seen with.
        recipes: the candidates.
        clock: what will time them; a scripted one runs nothing.
        config: what surrounds a Linear while it is timed.
        compile_options: keyword arguments of torch.compile.
        compiled: gets the compiled functions.
    """
    operands = Operands(take())
    for recipe in (None, *recipes):
        work = Replay(operands, recipe, compile_options, config.context, compiled)
        try:
            with torch.enable_grad(), no_collection():  # a compiler makes many objects
                clock.warm_up([_Once(work)])
        except Exception as error:
            logger.debug("compiling %s failed", work.variant, exc_info=error)


class _Once:
    """Work that is done after one run, however often it is called."""

    def __init__(self, work: Work) -> None:
        self.signature = work.signature
        self.variant = work.variant
        self._work: Work | None = work

    def __call__(self) -> None:
        """Run, the first time."""
        work, self._work = self._work, None
        if work:
            work()
