"""What a cache file may hold, beyond the types of its fields."""

import math
from datetime import date

from fp8tune.errors import CacheError
from fp8tune.records import Measurement

__all__ = ["check_date", "check_times"]


def check_times(measurement: Measurement) -> None:
    """Times that a speedup can be computed from, so that no reader has to check."""
    times = measurement.reference_ms + measurement.candidate_ms
    paired = len(measurement.reference_ms) == len(measurement.candidate_ms)
    if not (paired and all(0 < time < math.inf for time in times)):
        raise CacheError(
            f"the times of {measurement.signature} are {measurement.reference_ms} and "
            f"{measurement.candidate_ms}, expected pairs of finite ones above 0 ms"
        )


def check_date(recorded: str) -> None:
    """A date that can be compared, or none."""
    try:
        date.fromisoformat(recorded or "2000-01-01")
    except ValueError:
        raise CacheError(
            f'found {recorded!r} as a date, expected one such as "2026-01-31", or ""'
        ) from None
