"""The runs in a cache file, decided again from their raw times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fp8tune.cache_file import Key, read_file
from fp8tune.decide import decide
from fp8tune.records import Layer

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

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
        measurements: what is known under the key of each of its recipes.
        config: what it is decided with.
    """

    number: int
    key: Key
    layers: tuple[Layer, ...]
    measurements: tuple[Measurement, ...]
    config: TuneConfig

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """One for each layer, in model order."""
        return self._decide(self.layers)

    def _decide(self, layers: Sequence[Layer]) -> tuple[Decision, ...]:
        names = [key.recipe for key in self.key.each()]
        return decide(layers, self.measurements, names, self.config)

    def measured(self, signature: Signature) -> list[Measurement]:
        """The timings of one signature, one for each recipe that has any."""
        return self._by_signature.get(signature, [])

    @cached_property
    def _by_signature(self) -> dict[Signature, list[Measurement]]:
        found: dict[Signature, list[Measurement]] = {}
        for x in self.measurements:
            found.setdefault(x.signature, []).append(x)
        return found

    @property
    def emulated(self) -> bool:
        """Whether torchao emulated the GEMMs, as the recipe's settings tell."""
        return "emulate=True" in self.key.all_settings

    @cached_property
    def by_signature(self) -> tuple[Decision, ...]:
        """What would be decided for a layer called with one signature only."""
        excluded = {x: layer.excluded for layer in self.layers for x, _ in layer.calls}
        layers = [
            Layer(
                "",
                x.shape.k,
                x.shape.n,
                x.shape.weight_dtype,
                True,
                None,
                ((x, 1),),
                excluded[x],
            )
            for x in sorted(excluded)
        ]
        return self._decide(layers)

    @cached_property
    def recorded(self) -> str:
        """The day of its newest timing, or "" where nobody wrote it down."""
        used = {signature for layer in self.layers for signature, _ in layer.calls}
        known = [x.recorded for x in self.measurements if x.signature in used]
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
        Run(number, key, run, contents.of_run(key), config)
        for number, ((key, _), run) in enumerate(contents.runs.items(), 1)
    ]
