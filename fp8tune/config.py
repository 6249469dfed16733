"""The rarer knobs, each with its unit, its default and its check."""

import math
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from fp8tune.errors import ConfigError

__all__ = [
    "FIRST_LOOK",
    "MOST_SAMPLES",
    "Context",
    "Objective",
    "OnQuality",
    "OnShapeChange",
    "StaticFilter",
    "Timing",
    "TuneConfig",
    "Warmup",
]


# 8 pairs are the fewest whose extremes bound the median with 99%, which is what 95%
# over five looks asks for: 2 * (1/2)**8 = 0.8%.
FIRST_LOOK = 8

# Far more than any verdict needs, and what a cache may hold of one signature.
MOST_SAMPLES = 4096


class StaticFilter(StrEnum):
    """Which Linears are worth timing at all."""

    SMALL_KN = "small_kn"
    DIVISIBLE = "divisible"


class Timing(StrEnum):
    """How a Linear is run while it is timed."""

    AUTO = "auto"
    COMPILED = "compiled"
    EAGER = "eager"


class Context(StrEnum):
    """What surrounds a Linear while it is timed."""

    LINEAR = "linear"
    NORM_ACT = "norm_act"


class OnShapeChange(StrEnum):
    """What to do when a cached plan meets shapes that it was not made for."""

    RETUNE = "retune"
    WARN = "warn"
    RAISE = "raise"


class OnQuality(StrEnum):
    """What to do with a layer whose accuracy fell below ``min_sqnr_db`` in training."""

    WARN = "warn"
    REVERT = "revert"


class Warmup(StrEnum):
    """What candidates run as until they are timed."""

    AUTO = "auto"
    CONVERTED = "converted"
    REFERENCE = "reference"


class Objective(StrEnum):
    """What conversion is to save."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How to screen, time and decide.

    Attributes:
        static_filter: "small_kn" leaves out what torchao's table for the recipe calls
            too small, besides what the hardware cannot run; "divisible" leaves out only
            the latter, so that more layers are timed.
        include_output_layer: False leaves out what is kept in high precision elsewhere
            for stability: the output layer, which is the last Linear if its out_features
            is the number of rows of an nn.Embedding (torchtitan), and in a model of more
            than eight Linears the first and the last (accelerate), unless they belong to
            repeated blocks, which stay alike. True takes them in.
        timing: "auto" times compiled if ``compile`` is given to AutoFloat8, else eager.
        context: "linear" times a Linear alone; "norm_act" with RMSNorm before and SiLU
            behind it in both variants, so that casts which Inductor fuses into what
            surrounds them are not charged to float8.
        min_speedup: a layer is converted only if it is clearly faster than this many
            times its reference. 1.0 means any clear gain.
        objective: "time" converts what is clearly faster; "memory" what needs less
            memory at its peak and is not clearly slower than ``min_speedup``, which may
            be below 1; on GPUs only.
        min_sqnr_db: a recipe is rejected for a layer if the SQNR of its output or of one
            of its gradients against float32 is below this many dB, or not known. None
            rejects none.
        watch_every: training steps after which the accuracy of converted layers is
            measured again, on the running batch, once the plan is frozen; needs
            ``min_sqnr_db``. 0, the default, never does.
        on_quality: what happens when it falls below ``min_sqnr_db``: "warn" says so,
            "revert" also takes the layer back to high precision, in place.
        trust_prior: signatures whose verdict is clear without timing them are skipped: from
            timings of other shapes in the cache, or from a table that is published for
            this device. Their layers end as "expected_faster" or "expected_slower".
        confidence: probability, between 0 and 1, that the interval around a speedup
            holds the true median; it is kept over all looks at the growing samples.
        max_samples: pairs of timings per signature at most; 8 to 4,096.
        max_seconds: seconds of timing per signature at most, compilation apart; the
            eight pairs without which nothing can be said are always taken.
        capture_bytes: bytes of activations and gradients that may be kept for timing.
            None means 2% of the device's memory.
        on_shape_change: what happens when a cached plan meets other shapes: "retune"
            tunes again, "warn" keeps the plan, "raise" raises PlanMismatchError.
        trial_steps: training steps that may be spent on trying whole plans after the
            layers were timed. "auto" means 400 if ``compile`` is given to AutoFloat8, else
            0; 0 means none.
        warmup: what candidates run as until they are timed. "converted" is the float8 run
            from the first step; "reference" keeps high precision, which needs less memory
            as long as the model is not compiled. "auto" is "converted", or "reference" on
            a single GPU where the first forward would not fit by its shapes.
        float8_all_gather: whether FSDP2 gathers the weights of layers in float8 that are
            converted with a tensorwise recipe. "auto" tries it in the trial, where there
            is one, unless the recipe is a torchao config that asks for it; True does it
            from the freeze on, False never.
        trial_seconds: seconds in forward and backward that trying whole plans may take,
            compiling them included; the first three plans are compiled all the same.
        profile_dir: folder for a profiler trace of each signature that is timed, as
            TensorBoard's profiler plugin and Perfetto read it; None records none.
        html: path of a page that the first rank writes when the plan freezes; None
            writes none.

    Raises:
        ConfigError: a value is of the wrong kind or out of its range.
    """

    static_filter: StaticFilter = StaticFilter.SMALL_KN
    include_output_layer: bool = False
    timing: Timing = Timing.AUTO
    context: Context = Context.LINEAR
    min_speedup: float = 1.0
    objective: Objective = Objective.TIME
    min_sqnr_db: float | None = None
    watch_every: int = 0
    on_quality: OnQuality = OnQuality.WARN
    trust_prior: bool = False
    confidence: float = 0.95
    max_samples: int = 128
    max_seconds: float = 1.0
    capture_bytes: int | None = None
    on_shape_change: OnShapeChange = OnShapeChange.RETUNE
    trial_steps: int | Literal["auto"] = "auto"
    warmup: Warmup = Warmup.AUTO
    float8_all_gather: bool | Literal["auto"] = "auto"
    trial_seconds: float = 600.0
    profile_dir: str | os.PathLike[str] | None = None
    html: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _to_enum(self, "static_filter", StaticFilter)
        _to_enum(self, "timing", Timing)
        _to_enum(self, "context", Context)
        _to_enum(self, "on_shape_change", OnShapeChange)
        _to_enum(self, "objective", Objective)
        _to_enum(self, "warmup", Warmup)
        _to_enum(self, "on_quality", OnQuality)
        speedup, confidence = self.min_speedup, self.confidence
        _require(self, "min_speedup", _is_number(speedup) and speedup > 0, "above 0")
        inside = _is_number(confidence) and 0 < confidence < 1
        _require(self, "confidence", inside, "between 0 and 1")
        samples, seconds = self.max_samples, self.max_seconds
        fits = _is_int(samples) and FIRST_LOOK <= samples <= MOST_SAMPLES
        expected = f"{FIRST_LOOK} to {MOST_SAMPLES:,}"
        _require(self, "max_samples", fits, expected)
        sqnr = self.min_sqnr_db
        fits = sqnr is None or _is_number(sqnr)
        _require(self, "min_sqnr_db", fits, "None, or a number of dB")
        steps = self.watch_every
        counted = _is_int(steps) and not isinstance(steps, bool) and steps >= 0
        _require(self, "watch_every", counted, "0, or a number of steps")
        if steps and sqnr is None:
            raise ConfigError(
                f"watch_every is {steps}, and min_sqnr_db is None, so there is nothing "
                "to watch for; set min_sqnr_db to the least SQNR in dB, such as 20"
            )
        is_bool = self.include_output_layer in (True, False)
        _require(self, "include_output_layer", is_bool, "True or False")
        _require(
            self, "trust_prior", self.trust_prior in (True, False), "True or False"
        )
        positive = _is_number(seconds) and seconds > 0
        _require(self, "max_seconds", positive, "above 0 seconds")
        steps = self.trial_steps
        counted = steps == "auto" or (_is_int(steps) and steps >= 0)
        _require(self, "trial_steps", counted, "'auto', or 0 and more")
        gather = self.float8_all_gather
        known = gather in ("auto", True, False)
        _require(self, "float8_all_gather", known, "'auto', True or False")
        trial = self.trial_seconds
        positive = _is_number(trial) and trial > 0
        _require(self, "trial_seconds", positive, "above 0 seconds")
        size = self.capture_bytes
        fits = size is None or (_is_int(size) and size >= 0)
        _require(self, "capture_bytes", fits, "None, or 0 bytes and more")
        is_path = self.profile_dir is None or _is_path(self.profile_dir)
        _require(self, "profile_dir", is_path, "None, or the path of a folder")
        is_path = self.html is None or _is_path(self.html)
        _require(self, "html", is_path, "None, or the path of a file")


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


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
