"""What a cache may hold, beyond the types of its fields: numbers that can be true.

A file whose checksum is right may have been written by anybody. What passes here can be
computed with, so no reader has to check again.
"""

from datetime import date

from fp8tune.config import MOST_SAMPLES
from fp8tune.decision.accuracy import Accuracy
from fp8tune.decision.coverage import Coverage
from fp8tune.decision.folding import without_numbers
from fp8tune.decision.records import Layer, Measurement, Signature
from fp8tune.decision.trials import GATHER, MOST_STEPS, TrialRecord
from fp8tune.decision.watched import Fallen
from fp8tune.errors import CacheError

__all__ = [
    "check_date",
    "check_environment",
    "check_fallen",
    "check_measurement",
    "check_run",
]

# Integers up to here are floats too, so that no sum or product overflows.
_LARGEST = 2**53

# From less than a clock tick to more than thirty years: their ratios are finite.
_SHORTEST_MS, _LONGEST_MS = 1e-9, 1e12

_LARGEST_DB = 200.0

# FLOPs of a step on all ranks; 10**26 is what the largest trainings take altogether.
_MOST_FLOPS = 10**30


def check_measurement(measurement: Measurement) -> None:
    """Refuse times that no speedup could be computed from, and impossible sizes.

    Raises:
        CacheError: says what was found and what was expected.
    """
    _check_signature(measurement.signature)
    _check_times(measurement)
    check_date(measurement.recorded)
    for name in ("reference_bytes", "candidate_bytes"):
        value = getattr(measurement, name)
        _require(name, value, value is None or 0 <= value <= _LARGEST, "bytes")
    seconds = measurement.warm_up_s
    _require("warm_up_s", seconds, 0 <= seconds <= _LARGEST, "seconds")
    if measurement.accuracy is not None:
        _check_accuracy(measurement.accuracy)


def _check_signature(signature: Signature) -> None:
    shape = signature.shape
    sizes = (shape.m, shape.k, shape.n)
    fits = all(1 <= size <= _LARGEST for size in sizes)
    _require("M, K, N", sizes, fits, "sizes of at least 1")
    lowest = 1 if shape.transposed else 0
    fits = lowest <= shape.experts <= _LARGEST
    _require("experts", shape.experts, fits, f"at least {lowest}")


def _check_times(measurement: Measurement) -> None:
    reference, candidate = measurement.reference_ms, measurement.candidate_ms
    number = len(reference)
    if not (number == len(candidate) and 1 <= number <= MOST_SAMPLES):
        raise CacheError(
            f"found {number} times of the reference and {len(candidate)} of the "
            f"candidate, expected 1 to {MOST_SAMPLES:,} pairs"
        )
    for time in reference + candidate:
        if not _SHORTEST_MS <= time <= _LONGEST_MS:
            raise CacheError(f"found {time!r} as a time, expected ms above 0")


def _check_accuracy(accuracy: Accuracy) -> None:
    for name in ("output_db", "grad_input_db", "grad_weight_db"):
        value = getattr(accuracy, name)
        fits = value is None or -_LARGEST_DB <= value <= _LARGEST_DB
        _require(name, value, fits, f"dB between -{_LARGEST_DB:g} and {_LARGEST_DB:g}")
    for name in ("underflow", "saturation"):
        value = getattr(accuracy, name)
        fits = value is None or 0 <= value <= 1
        _require(name, value, fits, "a share between 0 and 1")


def check_date(recorded: str) -> None:
    """A date that can be compared, or none."""
    try:
        date.fromisoformat(recorded or "2000-01-01")
    except ValueError:
        raise CacheError(
            f'found {recorded!r} as a date, expected one such as "2026-01-31", or ""'
        ) from None


def check_environment(environment: tuple[tuple[str, str], ...]) -> None:
    """Refuse an environment that says one thing twice.

    Raises:
        CacheError: says what was found and what was expected.
    """
    names = tuple(name for name, _ in environment)
    _require("names", names, len(set(names)) == len(names), "each once")


def check_run(
    layers: tuple[Layer, ...],
    trial: TrialRecord | None,
    coverage: Coverage | None = None,
) -> None:
    """Refuse a model that cannot be, a trial of another model, impossible FLOPs.

    Raises:
        CacheError: says what was found and what was expected.
    """
    # Many layers share few sizes and calls.
    for layer in {(x.k, x.n, x.experts, x.calls): x for x in layers}.values():
        _check_calls(layer)
    names = {x.fqn for x in layers}
    if len(names) < len(layers):
        raise CacheError("found two layers of one name, expected each once")
    if trial is not None:
        _check_trial(trial, {x.fqn for x in layers if x.reason is None})
        _check_roles(trial, layers)
    if coverage is not None:
        counts = [coverage.candidates, *(flops for _, flops in coverage.rest)]
        fits = all(0 <= x <= _MOST_FLOPS for x in counts)
        _require("FLOPs", tuple(counts), fits, "at least 0")


def check_fallen(fallen: tuple[Fallen, ...], layers: tuple[Layer, ...]) -> None:
    """Refuse checks of the accuracy that no run of these layers can have made.

    Raises:
        CacheError: says what was found and what was expected.
    """
    names = tuple(x.fqn for x in fallen)
    candidates = {x.fqn for x in layers if x.reason is None}
    once = len(set(names)) == len(names) and candidates.issuperset(names)
    _require("layers that fell", names, once, "candidates of the run, each once")
    for x in fallen:
        inside = -_LARGEST_DB <= x.sqnr_db < x.least_db
        found = (x.sqnr_db, x.least_db)
        _require("SQNR, min_sqnr_db", found, inside, "dB, the first below the second")
        _require("steps", x.steps, 0 <= x.steps <= _LARGEST, "at least 0")


def _check_calls(layer: Layer) -> None:
    whole = layer.k, layer.n, layer.experts
    fits = all(0 <= x <= _LARGEST for x in whole)
    _require("K, N, E", whole, fits, "sizes")
    for signature, count in layer.calls:
        _check_signature(signature)
        shape = signature.shape
        found = shape.k, shape.n, shape.experts
        # Tensor and expert parallelism leave a rank a part of the layer; which size of a
        # matrix of experts is K only the call says.
        either = (layer.n, layer.k, layer.experts) if layer.experts else whole
        fits = bool(shape.experts) == bool(layer.experts) and any(
            all(x <= y for x, y in zip(found, z, strict=True)) for z in (whole, either)
        )
        _require(
            "K, N, E of a call",
            found,
            fits,
            f"the layer's {_shortened(whole)}, or a part",
        )
        _require("a count", count, 1 <= count <= _LARGEST, "at least 1")


def _check_trial(trial: TrialRecord, candidates: set[str]) -> None:
    named = {*trial.converted, *trial.unclear}
    named.update(fqn for role in trial.roles for fqn in role.fqns)
    named.discard(GATHER)
    if not named <= candidates:
        found = sorted(named - candidates)[0]
        raise CacheError(f"found {found!r} in a trial, expected candidates of the run")
    for x in trial.results:
        numbers = (x.step_ms, x.speedup, x.speedup_low, x.speedup_high or 0.0)
        fits = all(0 <= value <= _LONGEST_MS for value in numbers)
        _require("a trial's numbers", numbers, fits, "times and speedups above 0")
        counts = (x.layers, x.rounds, x.peak_bytes or 0)
        fits = all(0 <= value <= _LARGEST for value in counts)
        _require("a trial's counts", counts, fits, "at least 0")
    _check_gains(trial)
    _check_steps(trial)


def _check_gains(trial: TrialRecord) -> None:
    for x in trial.roles:
        gains = (x.alone_ms, x.in_step_ms or 0.0)
        fits = all(abs(value) <= _LONGEST_MS for value in gains)
        _require("what a role saves", gains, fits, "milliseconds")
        spreads = (x.alone_spread_ms, x.in_step_spread_ms or 0.0)
        fits = all(0 <= value <= _LONGEST_MS for value in spreads)
        _require("the spread of what a role saves", spreads, fits, "at least 0")


def _check_steps(trial: TrialRecord) -> None:
    steps, number = trial.steps, len(trial.steps.plans)
    fits = number == len(steps.ms) <= MOST_STEPS and 0 <= steps.first <= _LARGEST
    found = (steps.first, number, len(steps.ms))
    _require("a trial's steps", found, fits, f"as many times, at most {MOST_STEPS}")
    for x in steps.plans:
        fits = -1 <= x < len(trial.results)
        _require("a step's plan", x, fits, "its place in results, or -1")
    for x in steps.ms:
        _require("a step's time", x, 0 <= x <= _LONGEST_MS, "milliseconds")


def _check_roles(trial: TrialRecord, layers: tuple[Layer, ...]) -> None:
    """The same layer of all blocks, as the trial told them apart, has one verdict."""
    converted = frozenset(trial.converted)
    verdicts: dict[object, bool] = {}
    for x in layers:
        signatures = frozenset(signature for signature, _ in x.calls)
        role = (without_numbers(x.fqn), x.k, x.n, x.excluded, signatures)
        if x.reason is None and verdicts.setdefault(role, x.fqn in converted) != (
            x.fqn in converted
        ):
            raise CacheError(
                f"found a trial that converts a part of {role[0]}, expected all or none"
            )


def _require(name: str, found: object, fits: bool, expected: str) -> None:
    if not fits:
        # An integer of thousands of digits cannot be printed, and need not be.
        said = _shortened(found)
        raise CacheError(f"{name}: found {said}, expected {expected}")


def _shortened(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shortened, value))
    large = isinstance(value, int) and abs(value) > _LARGEST
    return f"a number above {_LARGEST}" if large else repr(value)
