"""Timings of earlier runs, in one JSON file for many models, GPUs and recipes.

The file is described in docs/cache-format.md. Whatever is wrong with it, or with the
disk, costs a warning and some timing, never the training run.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from filelock import FileLock

from fp8tune.cache_file import (
    Contents,
    Key,
    read_file,
    without_calls,
    write_file,
)
from fp8tune.codec import encode
from fp8tune.errors import CacheError
from fp8tune.files import set_aside
from fp8tune.records import Layer, Measurement, Signature
from fp8tune.trial_records import TrialRecord

__all__ = ["LOCK_TIMEOUT_S", "Cache", "Key"]

# Seconds to wait for another writer, who needs the lock for well under one.
LOCK_TIMEOUT_S = 30.0

_logger = logging.getLogger("fp8tune")


class Cache:
    """One cache file: read when this is made, merged with what is there when saved."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The file itself rather than a link to it, which os.replace would overwrite;
        # absolute, since training may change the working directory before it saves.
        self.path = Path(os.path.realpath(path))
        self._why_empty = f"the cache {self.path} is empty"
        self._contents = self._load()

    def measurements(self, key: Key) -> dict[Signature, Measurement]:
        """What was measured under this key, which is that of one recipe."""
        return dict(self._contents.measurements.get(key, {}))

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
        return None if run is None or self._contents.unmeasured(key, run) else run

    def trial(self, key: Key, layers: tuple[Layer, ...]) -> TrialRecord | None:
        """How the trial of the same model's latest run ended, or None without one."""
        return self._contents.trials.get((key, without_calls(layers)))

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
    ) -> None:
        """Add a run to the file; what other processes wrote meanwhile is kept.

        Args:
            key: what the run was made under.
            layers: the model, with calls; replaces its earlier run under this key.
            measurements: replace earlier ones of the same key and signature. Failed
                ones are not saved, so that the next run tries again.
            trial: how the run's trial ended, if it had one.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT_S):
                contents = self._read_or_set_aside()
                contents.add(key, layers, measurements, trial)
                write_file(self.path, contents)
        except (OSError, CacheError) as problem:  # a filelock.Timeout is an OSError
            _logger.warning(
                "the cache %s was not saved: %s; training goes on, and the next run "
                "times these layers again",
                self.path,
                problem,
            )
        else:
            self._contents = contents

    def _load(self) -> Contents:
        try:
            return read_file(self.path)
        except FileNotFoundError:
            self._why_empty = f"there is no file {self.path} yet"
        except (OSError, CacheError) as problem:
            self._why_empty = f"the cache {self.path} could not be read"
            _logger.warning(
                "the cache %s could not be read: %s; it counts as empty, and the "
                "layers are timed again",
                self.path,
                problem,
            )
        return Contents()

    def _read_or_set_aside(self) -> Contents:
        try:
            return read_file(self.path)
        except FileNotFoundError:
            return Contents()
        except CacheError as problem:
            _logger.warning(
                "the cache %s could not be read: %s; it was moved to %s, and a new "
                "file takes its place",
                self.path,
                problem,
                set_aside(self.path),
            )
            return Contents()

    def _explain_unmeasured(self, key: Key, model: tuple[Layer, ...]) -> str:
        run = self._contents.runs[key, model]
        missing = {x.shape for x, _ in self._contents.unmeasured(key, run)}
        shapes = sorted(f"M={x.m} K={x.k} N={x.n}" for x in missing)
        if not shapes:
            return "nothing differs"
        return f"{len(shapes)} signatures have no measurement, such as {shapes[0]}"


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
