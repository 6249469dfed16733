"""The runs in a cache file, decided again from their raw times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fp8tune.cache_file import Key, read_file
from fp8tune.decide import decide
from fp8tune.records import Layer

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from fp8tune.config import TuneConfig
    from fp8tune.records import Decision, Measurement, Signature

__all__ = ["Run", "load_runs"]


@dataclass(frozen=True)
class Run:
    """One run of a cache file.

    Attributes:
        number: its place in the file, from 1, the oldest first.
        key: what it was made under.
        layers: the model, with calls.
        measurements: what is known under its key.
        config: what it is decided with.
    """

    number: int
    key: Key
    layers: tuple[Layer, ...]
    measurements: Mapping[Signature, Measurement]
    config: TuneConfig

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """One for each layer, in model order."""
        # Alike layers are decided once: a large model has thousands of few kinds.
        kinds = [(x.k, x.n, x.reason, x.calls) for x in self.layers]
        distinct = dict(zip(kinds, self.layers, strict=True))
        decided = decide(
            list(distinct.values()), self.measurements, self.key.recipe, self.config
        )
        by_kind = dict(zip(distinct, decided, strict=True))
        return tuple(
            replace(by_kind[kind], fqn=layer.fqn)
            for kind, layer in zip(kinds, self.layers, strict=True)
        )

    @property
    def emulated(self) -> bool:
        """Whether torchao emulated the GEMMs, as the recipe's settings tell."""
        return "emulate=True" in self.key.settings

    @cached_property
    def by_signature(self) -> tuple[Decision, ...]:
        """What would be decided for a layer called with one signature only."""
        calls = sorted({(x, 1) for layer in self.layers for x, _ in layer.calls})
        layers = [
            Layer("", x.shape.k, x.shape.n, x.shape.weight_dtype, True, None, ((x, n),))
            for x, n in calls
        ]
        return decide(layers, self.measurements, self.key.recipe, self.config)

    @cached_property
    def recorded(self) -> str:
        """The day of its newest timing, or "" where nobody wrote it down."""
        used = {signature for layer in self.layers for signature, _ in layer.calls}
        known = [self.measurements[x].recorded for x in used & self.measurements.keys()]
        return max(known, default="")


def load_runs(path: str | os.PathLike[str], config: TuneConfig) -> list[Run]:
    """The runs of a cache file, the newest last.

    Args:
        path: the file.
        config: ``min_speedup``, ``confidence`` and ``max_samples`` are used.

    Raises:
        CacheError: the file is damaged or of another version.
        OSError: there is no such file, or it cannot be read.
    """
    contents = read_file(Path(path))
    return [
        Run(number, key, run, contents.measurements.get(key, {}), config)
        for number, ((key, _), run) in enumerate(contents.runs.items(), 1)
    ]
