"""Timings of earlier runs, of many models, GPUs and recipes.

They lie in a file or a store, as docs/cache-format.md describes. Whatever is wrong with
it, or with the disk, costs a warning and some timing, never the training run.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime

from fp8tune.decision.coverage import Coverage
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.decision.trials import TrialRecord
from fp8tune.decision.watched import Fallen
from fp8tune.errors import CacheError
from fp8tune.store.codec import encode
from fp8tune.store.contents import Contents, Key, Recorded, without_calls
from fp8tune.store.places import place_of
from fp8tune.store.pruning import pruned

__all__ = ["Cache", "Key"]

_logger = logging.getLogger("fp8tune")


class Cache:
    """One cache: read when this is made, merged with what is there when saved.

    Args:
        place: the path of a file, or a URL.

    Raises:
        ConfigError: it can be neither.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self._place = place_of(place)
        self._why_empty = f"the cache {self._place} is empty"
        self._contents = self._load()

    def measurements(self, key: Key) -> dict[Signature, Measurement]:
        """What was measured under this key, which is that of one recipe."""
        return dict(self._contents.measurements.get(key, {}))

    def parts(self, key: Key) -> list[Measurement]:
        """What was measured of only some GEMMs of that recipe."""
        return self._contents.parts(key)

    def of_run(self, key: Key) -> tuple[Measurement, ...]:
        """What was measured under the key of each of a run's recipes."""
        return self._contents.of_run(key)

    def layers(self, key: Key, layers: tuple[Layer, ...]) -> tuple[Layer, ...] | None:
        """The same model's layers with their calls, as its latest run recorded them.

        Args:
            key: what the run must have been made under.
            layers: the model; calls are not looked at.

        Returns:
            the layers, or None unless there is such a run and a measurement of every
            signature in its calls.
        """
        run = self._contents.runs.get((key, without_calls(layers)))
        if run is None or self._contents.unmeasured(key, run.layers):
            return None
        return run.layers

    def trial(self, key: Key, layers: tuple[Layer, ...]) -> TrialRecord | None:
        """How the trial of the same model's latest run ended, or None without one."""
        run = self._contents.runs.get((key, without_calls(layers)))
        return run and run.trial

    def coverage(self, key: Key, layers: tuple[Layer, ...]) -> Coverage | None:
        """What candidates are of the same model's matrix products, if that is known."""
        run = self._contents.runs.get((key, without_calls(layers)))
        return run and run.coverage

    def fallen(self, key: Key, layers: tuple[Layer, ...]) -> tuple[Fallen, ...]:
        """Which layers lost their accuracy while the same model's latest run trained."""
        run = self._contents.runs.get((key, without_calls(layers)))
        return run.fallen if run else ()

    def explain_miss(self, key: Key, layers: tuple[Layer, ...]) -> str:
        """One line that says how the nearest recorded run differs from this one.

        Args:
            key: what this run is made under.
            layers: the model; calls are not looked at.
        """
        if not self._contents.runs:
            return self._why_empty
        model = without_calls(layers)
        # The latest first, so that it wins where two are equally near.
        differences = [
            (_key_differences(old_key, key), _layer_differences(old_model, model))
            for old_key, old_model in reversed(self._contents.runs)
        ]
        of_key, of_layers = min(differences, key=lambda pair: len(pair[0] + pair[1]))
        lines = of_key + of_layers[:1]
        if len(of_layers) > 1:
            lines.append(f"{len(of_layers) - 1} more differences in the layers")
        return "; ".join(lines) or self._explain_unmeasured(key, model)

    def save(
        self,
        key: Key,
        layers: tuple[Layer, ...],
        measurements: Iterable[Measurement],
        trial: TrialRecord | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        """Add a run; what other processes wrote meanwhile is kept.

        Args:
            key: what the run was made under.
            layers: the model, with calls; replaces its earlier run under this key.
            measurements: replace earlier ones of the same key and signature. Failed
                ones are not saved, so that the next run tries again.
            trial: how the run's trial ended, if it had one.
            coverage: what candidates are of its matrix products, if that is known.
        """
        run = Recorded(layers, trial, _now(), coverage)

        def change(contents: Contents) -> Contents:
            contents.add(key, run, measurements)
            return pruned(contents)

        self._update(change)

    def save_fallen(
        self, key: Key, models: Collection[tuple[Layer, ...]], fallen: Iterable[Fallen]
    ) -> None:
        """Add to the runs of these models which of their layers lost their accuracy.

        Args:
            key: what they were made under.
            models: layers without calls; of one that has no run nothing is saved.
            fallen: what is said of a layer replaces what was said before.
        """
        known = {x.fqn: x for x in fallen}

        def change(contents: Contents) -> Contents:
            for model in models:
                run = contents.runs.get((key, model))
                names = {x.fqn for x in model if x.reason is None}
                new = {fqn: x for fqn, x in known.items() if fqn in names}
                if run and new:
                    every = {x.fqn: x for x in run.fallen} | new
                    contents.add_run(
                        key, run._replace(fallen=tuple(every.values()), saved=_now())
                    )
            return contents

        self._update(change)

    def _update(self, change: Callable[[Contents], Contents]) -> None:
        try:
            self._contents = self._place.update(change)
        except Exception as problem:  # noqa: BLE001 - file systems raise what they like
            _logger.warning(
                "the cache %s was not saved: %s; training goes on, and the next run "
                "times these layers again",
                self._place,
                _said(problem),
            )

    def _load(self) -> Contents:
        try:
            contents = self._place.read()
        except FileNotFoundError:
            self._why_empty = f"there is no file {self._place} yet"
        except Exception as problem:  # noqa: BLE001 - file systems raise what they like
            self._why_empty = f"the cache {self._place} could not be read"
            _logger.warning(
                "the cache %s could not be read: %s; it counts as empty, and the "
                "layers are timed again",
                self._place,
                _said(problem),
            )
        else:
            self._warn_of(contents.problems)
            return contents
        return Contents()

    def _warn_of(self, problems: list[str]) -> None:
        if problems:
            _logger.warning(
                "the cache %s has %d entries that could not be read, such as %s; they "
                "count as missing, and their layers are timed again",
                self._place,
                len(problems),
                problems[0],
            )

    def _explain_unmeasured(self, key: Key, model: tuple[Layer, ...]) -> str:
        run = self._contents.runs[key, model]
        missing = {x.shape for x, _ in self._contents.unmeasured(key, run.layers)}
        shapes = sorted(f"M={x.m} K={x.k} N={x.n}" for x in missing)
        if not shapes:
            return "nothing differs"
        return f"{len(shapes)} signatures have no measurement, such as {shapes[0]}"


def _now() -> str:
    return datetime.now(UTC).isoformat("T", "microseconds")


def _said(problem: Exception) -> str:
    known = isinstance(problem, OSError | CacheError)
    return str(problem) if known else f"{type(problem).__name__}: {problem}"


def _key_differences(old: Key, new: Key) -> list[str]:
    environment = _differences(
        "environment.", dict(old.environment), dict(new.environment)
    )
    rest = [
        {"recipe": x.label, "settings": x.all_settings, "timing": x.timing}
        for x in (old, new)
    ]
    return environment + _differences("", *rest)


def _layer_differences(old: tuple[Layer, ...], new: tuple[Layer, ...]) -> list[str]:
    if old == new:
        return []
    recorded = {layer.fqn: layer for layer in old}
    present = {layer.fqn: layer for layer in new}
    lines: list[str] = []
    for fqn in recorded | present:
        if fqn not in recorded:
            lines.append(f"{fqn} is new")
        elif fqn not in present:
            lines.append(f"{fqn} is gone")
        elif recorded[fqn] != present[fqn]:
            pair = encode(recorded[fqn]), encode(present[fqn])
            lines += _differences(f"{fqn}.", *pair)
    return lines or ["the layers come in another order"]


def _differences(
    prefix: str, old: Mapping[str, object], new: Mapping[str, object]
) -> list[str]:
    return [
        f"{prefix}{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
