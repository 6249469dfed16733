"""The rarer knobs, each with its unit, its default and its check."""

import math
from dataclasses import dataclass
from enum import StrEnum

from fp8tune.errors import ConfigError
from fp8tune.intervals import FIRST_LOOK

__all__ = ["OnShapeChange", "StaticFilter", "Timing", "TuneConfig"]


class StaticFilter(StrEnum):
    """Which Linears are worth timing at all."""

    SMALL_KN = "small_kn"
    DIVISIBLE = "divisible"


class Timing(StrEnum):
    """How a Linear is run while it is timed."""

    AUTO = "auto"
    COMPILED = "compiled"
    EAGER = "eager"


class OnShapeChange(StrEnum):
    """What to do when a cached plan meets shapes that it was not made for."""

    RETUNE = "retune"
    WARN = "warn"
    RAISE = "raise"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How to screen, time and decide.

    Attributes:
        static_filter: "small_kn" leaves out what torchao's table for the recipe calls
            too small, besides what the hardware cannot run; "divisible" leaves out only
            the latter, so that more layers are timed.
        timing: "auto" times compiled if ``compile`` is given to AutoFloat8, else eager.
        min_speedup: a layer is converted only if it is clearly faster than this many
            times its reference. 1.0 means any clear gain.
        confidence: probability, between 0 and 1, that the interval around a speedup
            holds the true median; it is kept over all looks at the growing samples.
        max_samples: pairs of timings per signature at most.
        max_seconds: seconds of timing per signature at most, compilation apart; the
            eight pairs without which nothing can be said are always taken.
        capture_bytes: bytes of activations and gradients that may be kept for timing.
            None means 2% of the device's memory.
        on_shape_change: what happens when a cached plan meets other shapes: "retune"
            tunes again, "warn" keeps the plan, "raise" raises PlanMismatchError.

    Raises:
        ConfigError: a value is of the wrong kind or out of its range.
    """

    static_filter: StaticFilter = StaticFilter.SMALL_KN
    timing: Timing = Timing.AUTO
    min_speedup: float = 1.0
    confidence: float = 0.95
    max_samples: int = 128
    max_seconds: float = 1.0
    capture_bytes: int | None = None
    on_shape_change: OnShapeChange = OnShapeChange.RETUNE

    def __post_init__(self) -> None:
        _to_enum(self, "static_filter", StaticFilter)
        _to_enum(self, "timing", Timing)
        _to_enum(self, "on_shape_change", OnShapeChange)
        speedup, confidence = self.min_speedup, self.confidence
        _require(self, "min_speedup", _is_number(speedup) and speedup > 0, "above 0")
        inside = _is_number(confidence) and 0 < confidence < 1
        _require(self, "confidence", inside, "between 0 and 1")
        samples, seconds = self.max_samples, self.max_seconds
        enough = _is_int(samples) and samples >= FIRST_LOOK
        _require(self, "max_samples", enough, f">= {FIRST_LOOK}")
        positive = _is_number(seconds) and seconds > 0
        _require(self, "max_seconds", positive, "above 0 seconds")
        size = self.capture_bytes
        fits = size is None or (_is_int(size) and size >= 0)
        _require(self, "capture_bytes", fits, "None, or 0 bytes and more")


def _is_int(value: object) -> bool:
    return isinstance(value, int)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _to_enum(config: TuneConfig, name: str, kind: type[StrEnum]) -> None:
    value = getattr(config, name)
    try:
        object.__setattr__(config, name, kind(value))
    except ValueError:
        known = ", ".join(repr(str(member)) for member in kind)
        raise ConfigError(f"{name} is {value!r}; choose one of {known}") from None


def _require(config: TuneConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be {expected}")
