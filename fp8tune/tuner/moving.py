"""The device of tuning is that of the tensors, wherever the model was when it was wrapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8tune.model.linears import named_gemms
from fp8tune.model.sharding import running_device
from fp8tune.report.moved import BEGUN_ANEW, KEPT_MOVING, STAGES_MOVED

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from fp8tune.tuner.pipeline import Pipeline

__all__ = ["Moves", "device_of"]

# A model that is moved, or comes back, is no habit; a loop that moves it is.
_MOST = 3


class Moves:
    """Tells where a model runs, if tuning began elsewhere.

    Layers are looked at between passes, and calls in them: what is offloaded at rest is
    moved for its call only.
    """

    def __init__(self) -> None:
        self._at_rest: torch.device | None = None
        self._number = 0

    def begin(self, pipeline: Pipeline) -> None:
        """Tuning begins where the layers are now."""
        self._at_rest = _at_rest(pipeline)

    def now(self, pipeline: Pipeline) -> torch.device | None:
        """Where the layers run, or None if that is where tuning began.

        Called before each pass.
        """
        rest = _at_rest(pipeline)
        if rest is not None and rest != self._at_rest:
            return rest
        called = pipeline.capture.device
        elsewhere = called is not None and called.type != pipeline.device.type
        return called if elsewhere else None

    @property
    def often(self) -> bool:
        """Whether it has moved before."""
        return self._number > 1

    def line(self, pipeline: Pipeline, now: torch.device) -> tuple[str, bool]:
        """What to say of it, and whether tuning begins anew."""
        self._number += 1
        text = BEGUN_ANEW
        if pipeline.staged:
            text = STAGES_MOVED
        elif self._number > _MOST:
            text = KEPT_MOVING
        return text.format(now=now, before=pipeline.device), text is BEGUN_ANEW


def device_of(module: nn.Module) -> torch.device | None:
    """Of the first Linear that is not on the meta device, if there is one."""
    return _first(linear for _, linear in named_gemms(module))


def _at_rest(pipeline: Pipeline) -> torch.device | None:
    """Of the first layer; None where there is none, or its weight is taken away."""
    return _first(x.linear for x in pipeline.candidates[:1])


def _first(linears: Iterable[nn.Linear]) -> torch.device | None:
    return next((x for x in map(running_device, linears) if x.type != "meta"), None)
