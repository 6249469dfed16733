"""The runs in a cache file, decided again from their raw times. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from fp8tune.decision.decide import decide
from fp8tune.decision.decisions import Decisions, verdicts_after
from fp8tune.decision.kinds import kind_of, sizes_of
from fp8tune.decision.records import Layer
from fp8tune.decision.trials import NONE_NEEDED
from fp8tune.decision.trust import with_expected
from fp8tune.decision.watched import decisions_after_checks
from fp8tune.store.places import place_of

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.decision.coverage import Coverage
    from fp8tune.decision.records import Decision, Measurement, Signature
    from fp8tune.decision.trials import TrialRecord
    from fp8tune.decision.trust import Expectation
    from fp8tune.decision.watched import Fallen
    from fp8tune.store.contents import Key

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
        trial: how its whole training steps ended, or None if there was no trial.
        coverage: what candidates are of its matrix products, or None if nobody counted.
        fallen: layers whose accuracy fell later, while it trained.
        expected: of calls that were skipped, since they were clear; a cache has none.
    """

    number: int
    key: Key
    layers: tuple[Layer, ...]
    measurements: tuple[Measurement, ...]
    config: TuneConfig
    trial: TrialRecord | None = None
    coverage: Coverage | None = None
    fallen: tuple[Fallen, ...] = ()
    expected: tuple[Expectation, ...] = ()

    @cached_property
    def alone(self) -> tuple[Decision, ...]:
        """One for each layer, in model order, by what it measured alone."""
        return self._decide(self.layers)

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """The same as the run ended: after its trial, and after checks of its accuracy."""
        return decisions_after_checks(self.at_freeze, self.fallen)

    @cached_property
    def at_freeze(self) -> tuple[Decision, ...]:
        """The same with the verdicts of its trial, if it had one."""
        if self.trial is None:
            return self.alone
        return verdicts_after(self.alone, self.trial, self.key.label)

    def _decide(self, layers: Sequence[Layer]) -> tuple[Decision, ...]:
        names = [key.recipe for key in self.key.each()]
        timed = decide(layers, self.measurements, names, self.config)
        return with_expected(timed, self.expected, self.config)

    @cached_property
    def plan(self) -> Decisions:
        """The decisions, and what they are true of; the reference's dtype is not kept."""
        key = self.key
        return Decisions(
            self.decisions,
            key.label,
            "high precision",
            self.emulated,
            key.timing,
            key.environment,
            self.trial,
            self.coverage,
        )

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
        # Of a range what was timed; the rest follows from it.
        sizes = sizes_of((x, 1) for x in excluded)
        # Names that differ in more than numbers, so that none shares its calls.
        layers = [
            Layer(
                f"signature{i}",
                x.shape.k,
                x.shape.n,
                x.shape.weight_dtype,
                True,
                None,
                ((x, 1),),
                excluded[x],
            )
            for i, x in enumerate(sorted(excluded))
            if x in self._by_signature or len(sizes[kind_of(x)]) == 1
        ]
        return tuple(replace(x, fqn="") for x in self._decide(layers))

    @cached_property
    def measured_here(self) -> tuple[Measurement, ...]:
        """The timings of what this run called; those of others share its key."""
        used = {signature for layer in self.layers for signature, _ in layer.calls}
        return tuple(x for x in self.measurements if x.signature in used)

    @property
    def recorded(self) -> str:
        """The day of its newest timing, or "" where nobody wrote it down."""
        return max((x.recorded for x in self.measured_here), default="")


def load_runs(path: str | os.PathLike[str], config: TuneConfig) -> list[Run]:
    """The runs of a cache file, the newest last.

    Args:
        path: the file, or a URL.
        config: ``min_speedup``, ``confidence`` and ``max_samples`` are used.

    Raises:
        CacheError: the file is damaged or of another version.
        OSError: there is no such file, or it cannot be read.
    """
    contents = place_of(path).read()
    return [
        Run(
            number,
            key,
            run.layers,
            contents.of_run(key),
            config,
            None if run.trial == NONE_NEEDED else run.trial,
            run.coverage,
            run.fallen,
        )
        for number, ((key, _), run) in enumerate(contents.runs.items(), 1)
    ]
