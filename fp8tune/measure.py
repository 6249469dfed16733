"""Stage 3: how long one signature takes in high precision and converted.

Reference and candidates are run in rounds, forth and back: A B C C B A. So drift of
clocks and temperature falls on all alike, and each time of a candidate has the time of
the reference from its own half of the round. Rounds are added until every candidate is
clearly faster or slower than ``min_speedup``, and the fastest clearly the fastest, or a
budget is spent. While something else keeps the machine busy, times are several times
their minimum, and not equally so for all: then sampling goes on until the budget ends.

Right after a variant is warmed up it runs once more, for its accuracy and its memory.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from datetime import UTC, datetime
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.accuracy import accuracy_of
from fp8tune.intervals import FIRST_LOOK, is_steady, looks, speedup_interval
from fp8tune.memory import default_capture_bytes, is_out_of_memory, peak_bytes
from fp8tune.records import Accuracy, Measurement, Reason, Sample
from fp8tune.replay import Operands, Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8tune.clock import Clock, Work
    from fp8tune.config import TuneConfig
    from fp8tune.recipes import Recipe

__all__ = ["measure", "measure_all"]

logger = logging.getLogger("fp8tune")


def measure(
    sample: Sample,
    recipe: Recipe,
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any] | None = None,
    *,
    release: Callable[[], object] = gc.collect,
    trace: Callable[[Work, Work], None] | None = None,
) -> Measurement:
    """Time one signature with one recipe; see ``measure_all``."""
    take, candidates = lambda: sample, [recipe]
    return measure_all(
        take, candidates, clock, config, compile_options, release=release, trace=trace
    )[0]


def measure_all(
    take: Callable[[], Sample],
    recipes: Sequence[Recipe],
    clock: Clock,
    config: TuneConfig,
    compile_options: Mapping[str, Any] | None = None,
    *,
    release: Callable[[], object] = gc.collect,
    trace: Callable[[Work, Work], None] | None = None,
) -> list[Measurement]:
    """Time one signature; never raises for what happens inside the timed work.

    Args:
        take: returns the signature with the tensors it was seen with; a sample that
            was passed in would be held by the caller's frame when memory ran out.
        recipes: the candidates, timed in the same rounds.
        clock: what times the work.
        config: ``min_speedup``, ``confidence``, ``max_samples``, ``max_seconds`` and
            ``capture_bytes``.
        compile_options: keyword arguments of torch.compile, or None to time eagerly.
        release: called when memory ran out, to let go of captured tensors.
        trace: called with the reference and each candidate once they are timed; must
            not raise.

    Returns:
        The raw times, one record per recipe. A candidate that raises is left out and
        the others go on. Out of memory is tried again with random numbers, once captured
        tensors are released, and then reported as the failure "out_of_memory"; any other
        error is reported as "not_measured" with its message.
    """

    def attempt(sample: Sample, recipes: Sequence[Recipe]) -> dict[str, Measurement]:
        race = _Race(sample, recipes, clock, config, compile_options)
        return {x.recipe: x for x in race.run(trace)}

    sample = take()
    results = attempt(sample, recipes)
    again = [x for x in recipes if results[x.name].failure is Reason.OUT_OF_MEMORY]
    if again:
        release()
        sample = Sample(sample.signature, sample.linear, None, None)
        _free_memory()
        results |= attempt(sample, again)
    return [results[x.name] for x in recipes]


class _Race:
    """The variants of one signature, and what is known of each so far."""

    def __init__(
        self,
        sample: Sample,
        recipes: Sequence[Recipe],
        clock: Clock,
        config: TuneConfig,
        compile_options: Mapping[str, Any] | None,
    ) -> None:
        self._sample = sample
        self._clock = clock
        self._config = config
        self._operands = Operands(sample)
        around = config.context
        self._reference = Replay(self._operands, None, compile_options, around)
        self._candidates = [
            Replay(self._operands, x, compile_options, around) for x in recipes
        ]
        # What is known of each candidate besides its times.
        self._known = {
            x.variant: Measurement(sample.signature, x.variant)
            for x in self._candidates
        }
        self._running = list(self._candidates)
        self._warm_up_s = 0.0

    def run(self, trace: Callable[[Work, Work], None] | None) -> list[Measurement]:
        """Warm up, time, and let the trace see what was timed."""
        try:
            with torch.enable_grad():
                self._warm_up_one(self._reference)
                reference_bytes = self._peak_bytes(self._reference)
                for candidate in self._candidates:
                    self._warm_up(candidate, reference_bytes)
                rounds = self._timed()
                if trace:  # after the timing, which a profiler would slow down
                    for candidate in self._running:
                        trace(self._reference, candidate)
        except Exception as error:  # noqa: BLE001 - measuring must not end training
            for candidate in self._running:
                self._fail(candidate, error)
        else:
            self._keep(rounds)
        return list(self._known.values())

    def _warm_up(self, candidate: Replay, reference_bytes: int | None) -> None:
        try:
            self._warm_up_one(candidate)
            if candidate.ran:
                self._known[candidate.variant] = replace(
                    self._known[candidate.variant],
                    accuracy=self._accuracy(candidate),
                    reference_bytes=reference_bytes,
                    candidate_bytes=self._peak_bytes(candidate),
                )
        except Exception as error:  # noqa: BLE001 - the others go on
            self._drop(candidate, error)

    def _warm_up_one(self, work: Replay) -> None:
        started = self._clock.now()
        self._clock.warm_up([work])
        self._warm_up_s += self._clock.now() - started

    def _peak_bytes(self, work: Replay) -> int | None:
        return peak_bytes(self._operands.device, work) if work.ran else None

    def _accuracy(self, candidate: Replay) -> Accuracy | None:
        budget = self._config.capture_bytes
        if budget is None:
            budget = default_capture_bytes(self._operands.device)
        try:
            return accuracy_of(candidate, budget)
        except Exception as error:
            logger.debug("no accuracy of %s", candidate.variant, exc_info=error)
            return None

    def _timed(self) -> list[list[float]]:
        """Times of each half of a round: the reference, then those still running."""
        if not self._running:
            return []
        try:
            return _sample_until_clear(
                [self._reference, *self._running], self._clock, self._config
            )
        except Exception as error:
            if len(self._candidates) == 1 or not self._drop_culprits():
                raise
            logger.debug("timing goes on without who failed", exc_info=error)
            return self._timed()

    def _drop_culprits(self) -> bool:
        """Drop the candidates that fail alone too; whether there is one."""
        before = len(self._running)
        for candidate in list(self._running):
            try:
                self._clock.time_ms([candidate])
            except Exception as error:  # noqa: BLE001 - the others go on
                self._drop(candidate, error)
        return len(self._running) < before

    def _drop(self, candidate: Replay, error: Exception) -> None:
        self._fail(candidate, error)
        self._running.remove(candidate)
        _free_memory()

    def _fail(self, candidate: Replay, error: Exception) -> None:
        reason = (
            Reason.OUT_OF_MEMORY if is_out_of_memory(error) else Reason.NOT_MEASURED
        )
        logger.debug("measuring %s failed", candidate.signature, exc_info=error)
        first_line = str(error).strip().split("\n", 1)[0]
        self._known[candidate.variant] = Measurement(
            candidate.signature,
            candidate.variant,
            failure=reason,
            detail=f"{type(error).__name__}: {first_line}",
        )

    def _keep(self, rounds: Sequence[Sequence[float]]) -> None:
        sample = self._sample
        columns = [tuple(column) for column in zip(*rounds, strict=True)]
        for candidate, times in zip(self._running, columns[1:], strict=True):
            self._known[candidate.variant] = replace(
                self._known[candidate.variant],
                reference_ms=columns[0],
                candidate_ms=times,
                synthetic=sample.input is None or sample.grad_output is None,
                recorded=datetime.now(UTC).date().isoformat(),
                warm_up_s=self._warm_up_s,
            )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sample_until_clear(
    variants: Sequence[Replay], clock: Clock, config: TuneConfig
) -> list[list[float]]:
    """Times of all variants in each half of a round, in milliseconds."""
    times: list[list[float]] = []
    deadline = clock.now() + config.max_seconds
    stops = looks(config.max_samples)
    for number in stops:
        while len(times) < number:
            started = clock.now()
            times += _round(variants, clock)[: number - len(times)]
            ended = clock.now()
            if len(times) >= FIRST_LOOK and ended + (ended - started) > deadline:
                return times
        if _is_clear(times, config, len(stops)):
            return times
    return times


def _round(variants: Sequence[Replay], clock: Clock) -> list[list[float]]:
    times = clock.time_ms([*variants, *reversed(variants)])
    number = len(variants)
    return [times[:number], times[number:][::-1]]


def _is_clear(
    times: Sequence[Sequence[float]], config: TuneConfig, number_of_looks: int
) -> bool:
    """Whether more rounds would change nothing."""
    columns = list(zip(*times, strict=True))
    if not all(is_steady(column) for column in columns):
        return False

    def beats(
        slow: Sequence[float], fast: Sequence[float], factor: float
    ) -> bool | None:
        """Whether ``fast`` is clearly that many times faster, or clearly not."""
        ratios = [a / b for a, b in zip(slow, fast, strict=True)]
        interval = speedup_interval(ratios, config.confidence, number_of_looks)
        if interval.low > factor:
            return True
        return False if interval.high < factor else None

    reference, *candidates = columns
    verdicts = [beats(reference, x, config.min_speedup) for x in candidates]
    if None in verdicts:
        return False
    faster = [x for x, verdict in zip(candidates, verdicts, strict=True) if verdict]
    faster.sort(key=median)
    return all(beats(other, faster[0], 1.0) is not None for other in faster[1:])
