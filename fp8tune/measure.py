"""Stage 3: how long one signature takes in high precision and converted.

Reference and candidate are run in pairs, in the order A B B A, so that drift of clocks
and temperature falls on both alike. Samples are added until the interval of the speedup
excludes ``min_speedup``, or a budget is spent. While something else keeps the machine
busy, times are several times their minimum, and not equally so for both variants: then
sampling goes on until the budget ends.
"""

from __future__ import annotations

import gc
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fp8tune.intervals import FIRST_LOOK, is_steady, looks, speedup_interval
from fp8tune.memory import is_out_of_memory
from fp8tune.records import Measurement, Reason, Sample
from fp8tune.replay import Operands, Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fp8tune.clock import Clock
    from fp8tune.config import TuneConfig
    from fp8tune.recipes import Recipe

__all__ = ["measure"]

logger = logging.getLogger("fp8tune")


def measure(
    sample: Sample,
    recipe: Recipe,
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any] | None = None,
    *,
    release: Callable[[], object] = gc.collect,
) -> Measurement:
    """Time one signature; never raises for what happens inside the timed work.

    Args:
        sample: the signature and the tensors it was seen with.
        recipe: the candidate.
        clock: what times the work.
        config: ``min_speedup``, ``confidence``, ``max_samples`` and ``max_seconds``.
        compile_options: keyword arguments of torch.compile, or None to time eagerly.
        release: called when memory ran out, to let go of captured tensors.

    Returns:
        The raw times. Out of memory is tried again with random numbers, once captured
        tensors are released, and then reported as the failure "out_of_memory"; any other error is reported as
        "not_measured" with its message.
    """
    result = _attempt(sample, recipe, clock, config, compile_options)
    if result.failure is Reason.OUT_OF_MEMORY:
        sample = Sample(sample.signature, sample.linear, None, None)
        release()
        _free_memory()
        result = _attempt(sample, recipe, clock, config, compile_options)
    return result


def _attempt(
    sample: Sample,
    recipe: Recipe,
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any] | None,
) -> Measurement:
    operands = Operands(sample)
    pair = _Pair(
        Replay(operands, None, compile_options),
        Replay(operands, recipe, compile_options),
    )
    try:
        with torch.enable_grad():
            clock.warm_up(pair)
            times = _sample_until_clear(pair, clock, config)
    except Exception as error:  # noqa: BLE001 - measuring must not end a training run
        return _failed(sample, recipe, error)
    reference_ms, candidate_ms = zip(*times, strict=True)
    synthetic = sample.input is None or sample.grad_output is None
    return Measurement(
        sample.signature,
        recipe.name,
        reference_ms,
        candidate_ms,
        synthetic=synthetic,
        recorded=datetime.now(UTC).date().isoformat(),
    )


def _failed(sample: Sample, recipe: Recipe, error: Exception) -> Measurement:
    out_of_memory = is_out_of_memory(error)
    reason = Reason.OUT_OF_MEMORY if out_of_memory else Reason.NOT_MEASURED
    logger.debug("measuring %s failed", sample.signature, exc_info=error)
    first_line = str(error).strip().split("\n", 1)[0]
    detail = f"{type(error).__name__}: {first_line}"
    return Measurement(sample.signature, recipe.name, failure=reason, detail=detail)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Pair(NamedTuple):
    reference: Replay
    candidate: Replay


def _sample_until_clear(
    pair: _Pair, clock: Clock, config: TuneConfig
) -> list[tuple[float, float]]:
    """(reference, candidate) times of each pair, in milliseconds."""
    times: list[tuple[float, float]] = []
    deadline = clock.now() + config.max_seconds
    stops = looks(config.max_samples)
    for number in stops:
        while len(times) < number:
            started = clock.now()
            times += _two_pairs(pair, clock)[: number - len(times)]
            ended = clock.now()
            if len(times) >= FIRST_LOOK and ended + (ended - started) > deadline:
                return times
        if _is_clear(times, config, len(stops)):
            return times
    return times


def _two_pairs(pair: _Pair, clock: Clock) -> list[tuple[float, float]]:
    a, b = pair
    reference_1, candidate_1, candidate_2, reference_2 = clock.time_ms([a, b, b, a])
    return [(reference_1, candidate_1), (reference_2, candidate_2)]


def _is_clear(
    times: list[tuple[float, float]], config: TuneConfig, number_of_looks: int
) -> bool:
    if not all(is_steady(column) for column in zip(*times, strict=True)):
        return False
    ratios = [reference / candidate for reference, candidate in times]
    interval = speedup_interval(ratios, config.confidence, number_of_looks)
    return interval.low > config.min_speedup or interval.high < config.min_speedup
