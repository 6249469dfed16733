"""How far tuning has come, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

# The codec reads the types of the fields while it runs.
from fp8tune.decision.coverage import Coverage  # noqa: TC001
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.store.codec import decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp8tune.model.capture import Calls, Capture
    from fp8tune.store.runs import Run

__all__ = ["MadeFrom", "Seen"]

_Counts = dict[str, tuple[tuple[Signature, int], ...]]


@dataclass(frozen=True)
class Seen:
    """What a warmup has seen; no tensors.

    Attributes:
        steps: training steps that are over.
        calls: how often each layer was called with which signature in training.
        recomputed: the same of calls that backward made.
        coverage: what candidates are of a step's products, once that is counted.
    """

    steps: int
    calls: dict[str, tuple[tuple[Signature, int], ...]]
    recomputed: dict[str, tuple[tuple[Signature, int], ...]]
    coverage: Coverage | None = None

    @classmethod
    def of(cls, capture: Capture, steps: int) -> Self:
        """What was captured in so many steps."""
        calls, recomputed = map(_listed, capture.counts())
        return cls(steps, calls, recomputed, capture.coverage)

    @classmethod
    def load(cls, data: object) -> Self:
        """Undo ``dump``.

        Raises:
            CacheError: the data is none; the message names the place.
        """
        return decode(cls, data, "the tuning state: seen")

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return encode(self)

    def counters(self) -> tuple[Calls, Calls]:
        """The calls, and the recomputed ones, as ``Capture`` keeps them."""
        return _counted(self.calls), _counted(self.recomputed)


@dataclass(frozen=True)
class MadeFrom:
    """What the per-layer plan that is on trial was made from.

    Attributes:
        steps: the warmup's training steps.
        layers: with their calls.
        measurements: the timings.
    """

    steps: int
    layers: tuple[Layer, ...] = field(repr=False)
    measurements: tuple[Measurement, ...] = field(repr=False)

    @classmethod
    def of(cls, run: Run, steps: int) -> Self:
        """That of a run."""
        return cls(steps, run.layers, run.measurements)

    @classmethod
    def load(cls, data: object) -> Self:
        """Undo ``dump``.

        Raises:
            CacheError: the data is none; the message names the place.
        """
        return decode(cls, data, "the tuning state: made_from")

    def dump(self) -> dict[str, Any]:
        """As plain data."""
        return encode(self)


def _listed(calls: Mapping[str, Counter[Signature]]) -> _Counts:
    return {fqn: tuple(sorted(counts.items())) for fqn, counts in calls.items()}


def _counted(calls: _Counts) -> Calls:
    return {fqn: Counter(dict(counts)) for fqn, counts in calls.items()}
