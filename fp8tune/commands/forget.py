"""``fp8tune forget``: take old timings, or those of one environment, out of a cache."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fp8tune.commands.answer import Answer, NoEntryError, Screen
from fp8tune.errors import ConfigError
from fp8tune.report.columns import paragraph
from fp8tune.store.contents import Contents
from fp8tune.store.places import place_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fp8tune.decision.records import Measurement
    from fp8tune.store.contents import Key

__all__ = ["answer"]

_DAYS = {"d": 1, "w": 7}


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """Forget what matches all of the options; without any option, everything.

    Raises:
        ConfigError: an option cannot be understood.
        NoEntryError: nothing matches.
        CacheError, OSError: the file cannot be read or written.
    """
    before = None if arguments.older_than is None else _day(arguments.older_than)
    wanted = [_field(text) for text in arguments.env]
    place = place_of(arguments.cache)
    # Before a lock, which would leave a file behind; and what is damaged stays as it is.
    numbers = _numbers(contents := place.read(), _without(contents, before, wanted))
    if not any(numbers[:2]):
        raise NoEntryError(f"nothing in {arguments.cache} matches; it stays as it is")
    if not arguments.dry_run:
        place.update(lambda found: _without(found, before, wanted))
    return _told(arguments, numbers, screen)


def _told(
    arguments: argparse.Namespace, numbers: tuple[int, int, int, int], screen: Screen
) -> Answer:
    timings, runs, timings_left, runs_left = numbers
    verb = "would forget" if arguments.dry_run else "forgot"
    text = (
        f"{verb} {timings} timings and {runs} runs; {timings_left} timings and "
        f"{runs_left} runs are left in {arguments.cache}"
    )
    data = {
        "cache": arguments.cache,
        "dry_run": arguments.dry_run,
        "forgotten": {"measurements": timings, "runs": runs},
        "left": {"measurements": timings_left, "runs": runs_left},
    }
    return Answer(paragraph(text, screen.width), data)


def _without(
    contents: Contents, before: date | None, wanted: Sequence[tuple[str, str]]
) -> Contents:
    left = Contents()
    for key, measurements in contents.measurements.items():
        for measurement in measurements.values():
            if not (_matches(key, wanted) and _is_older(measurement, before)):
                left.add_measurement(key, measurement)
    for (key, _), run in contents.runs.items():
        layers = run.layers
        lost = left.unmeasured(key, layers) - contents.unmeasured(key, layers)
        # A run that nothing was timed in is as old as nobody knows.
        untimed = before is None and _matches(key, wanted)
        if not (lost or untimed):
            left.add_run(key, run)
    return left


def _matches(key: Key, wanted: Sequence[tuple[str, str]]) -> bool:
    environment = dict(key.environment)
    return all(
        fnmatchcase(environment.get(name, ""), pattern) for name, pattern in wanted
    )


def _is_older(measurement: Measurement, before: date | None) -> bool:
    """Whether it was recorded before that day; one without a date is older than all."""
    if before is None or not measurement.recorded:
        return True
    return date.fromisoformat(measurement.recorded) < before


def _numbers(contents: Contents, left: Contents) -> tuple[int, int, int, int]:
    """Timings and runs that go, timings and runs that stay."""
    timings, timings_left = (
        sum(map(len, x.measurements.values())) for x in (contents, left)
    )
    runs, runs_left = len(contents.runs), len(left.runs)
    return timings - timings_left, runs - runs_left, timings_left, runs_left


def _day(text: str) -> date:
    """30d, 8w or 2026-01-31 -> the first day that is kept."""
    age = re.fullmatch(r"(\d{1,5})([dw])", text)
    if age:
        days = int(age[1]) * _DAYS[age[2]]
        return datetime.now(UTC).date() - timedelta(days=days)
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--older-than is {text!r}; give days as 30d, weeks as 8w, or a date as "
            "2026-01-31"
        ) from None


def _field(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    if not (name and equals):
        raise ConfigError(
            f"--env is {text!r}; give a field and a value as torch=2.12.0 or "
            "'device=*H100*', as fp8tune show lists them"
        )
    return name, pattern
