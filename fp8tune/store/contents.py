"""What a cache holds: measurements and runs, each under the key that it is true of."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fp8tune.decision.coverage import Coverage
from fp8tune.decision.gemms import base_of, is_part
from fp8tune.decision.kinds import missing_m, sizes_of, work_of
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.decision.trials import TrialRecord
from fp8tune.decision.watched import Fallen
from fp8tune.store.bounds import check_fallen, check_measurement, check_run

__all__ = ["Contents", "Key", "Recorded", "without_calls"]


@dataclass(frozen=True)
class Key:
    """What a measurement is true of, besides its signature.

    Attributes:
        environment: (field, value) pairs such as ("torch", "2.13.0"); kept sorted.
        recipe: name of the recipe.
        settings: the recipe's configuration in words.
        timing: "compiled" or "eager".
        also: (name, settings) of the further recipes that a run chose among; of a
            measurement it is empty.
    """

    environment: tuple[tuple[str, str], ...]
    recipe: str
    settings: str
    timing: str
    also: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # Plain strings: torch.__version__ is of a subclass that compares as a version.
        pairs = sorted((str(name), str(value)) for name, value in self.environment)
        object.__setattr__(self, "environment", tuple(pairs))

    def each(self) -> tuple["Key", ...]:
        """The key of each recipe alone, under which its measurements are."""
        alone = replace(self, also=())
        others = [replace(alone, recipe=x, settings=y) for x, y in self.also]
        return (alone, *others)

    def of(self, measurement: Measurement) -> "Key":
        """The key that a measurement of this run belongs to."""
        each = {x.recipe: x for x in self.each()}
        name = measurement.recipe
        if name in each or not is_part(name):
            return each.get(name, self.each()[0])
        whole = each.get(base_of(name), self.each()[0])
        return replace(whole, recipe=name)

    @property
    def whole(self) -> "Key":
        """That of the whole recipe, if this is the key of a part of one."""
        return replace(self, recipe=base_of(self.recipe))

    @property
    def label(self) -> str:
        """The names of all recipes."""
        return ", ".join([self.recipe, *(name for name, _ in self.also)])

    @property
    def all_settings(self) -> str:
        """The configurations of all recipes."""
        return "; ".join([self.settings, *(settings for _, settings in self.also)])


class Recorded(NamedTuple):
    """A run as it was saved.

    Attributes:
        layers: the model, with calls.
        trial: how the trial of whole plans ended, or None if there was none.
        saved: when, in UTC, as "2026-01-31T12:00:00.000000+00:00"; "" if nobody said.
        coverage: what candidates are of its matrix products, or None if nobody counted.
        fallen: layers whose accuracy fell later, while it trained.
    """

    layers: tuple[Layer, ...]
    trial: TrialRecord | None = None
    saved: str = ""
    coverage: Coverage | None = None
    fallen: tuple[Fallen, ...] = ()


@dataclass
class Contents:
    """What a cache holds.

    Attributes:
        measurements: those that did not fail.
        runs: the latest run of each model under each key, oldest first. A model is its
            layers without calls.
        problems: what could not be read of it, and why.
    """

    measurements: dict[Key, dict[Signature, Measurement]] = field(default_factory=dict)
    runs: dict[tuple[Key, tuple[Layer, ...]], Recorded] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(
        self, key: Key, run: Recorded, measurements: Iterable[Measurement] = ()
    ) -> None:
        """Add a run and what it measured.

        Raises:
            CacheError: something of it is impossible.
        """
        for measurement in measurements:
            self.add_measurement(key.of(measurement), measurement)
        self.add_run(key, run)

    def of_run(self, key: Key) -> tuple[Measurement, ...]:
        """What is known of each recipe of a run."""
        wholes = [
            x for each in key.each() for x in self.measurements.get(each, {}).values()
        ]
        return (*wholes, *(x for each in key.each() for x in self.parts(each)))

    def parts(self, key: Key) -> list[Measurement]:
        """What was measured of only some GEMMs of one recipe."""
        every = self.measurements.items()
        keyed = [x for part, x in every if part != key and part.whole == key]
        return [x for known in keyed for x in known.values()]

    def unmeasured(
        self, key: Key, layers: tuple[Layer, ...]
    ) -> set[tuple[Signature, Key]]:
        """What a run needs that is not known of one of its recipes.

        A kind with one M needs that M, one with many those that stand for the others.
        """
        missing: set[tuple[Signature, Key]] = set()
        for each in key.each():
            known = sizes_of((x, 1) for x in self.measurements.get(each, ()))
            called = [x for x in layers if each.recipe not in dict(x.excluded)]
            for kind, work in work_of(called).items():
                lacking = missing_m(work, known.get(kind, ()))
                missing |= {(kind.at(m), each) for m in lacking}
        return missing

    def add_measurement(self, key: Key, measurement: Measurement) -> None:
        """Add or replace one measurement; failed ones are not kept.

        One from a busy machine does not replace another.

        Raises:
            CacheError: its numbers are impossible.
        """
        if measurement.failure is not None:
            return
        check_measurement(measurement)
        known = self.measurements.setdefault(key, {})
        if measurement.signature not in known or measurement.steady:
            known[measurement.signature] = measurement

    def add_run(self, key: Key, run: Recorded) -> None:
        """Add a run, which replaces the earlier one of the same model and key.

        Raises:
            CacheError: it is impossible.
        """
        check_run(run.layers, run.trial, run.coverage)
        check_fallen(run.fallen, run.layers)
        model = without_calls(run.layers)
        self.runs.pop((key, model), None)  # so that the latest run comes last
        self.runs[key, model] = run


def without_calls(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The model alone, which is what a run is found by."""
    return tuple([replace(x, calls=()) if x.calls else x for x in layers])
