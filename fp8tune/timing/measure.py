"""Stage 3: how long one signature takes in high precision and converted.

Reference and candidates are run in rounds, forth and back, A B C C B A, and in the next
round back and forth. So drift of clocks and temperature falls on all alike, and each time
of a candidate has the time of the reference from its own half of the round. Rounds are
added until every candidate is clearly faster or slower than ``min_speedup``, and the
fastest clearly the fastest, or a budget is spent. A candidate that takes more than twice as
long in all of the first round leaves after it. While something else keeps the machine busy,
times are several times their minimum, or the thread that times has a core for less than 0.9
of the time, and not equally so for all: then sampling goes on until the budget ends.

Right after a variant is warmed up it runs once more, for its accuracy and its memory.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.decision.accuracy import Accuracy
from fp8tune.decision.intervals import FIRST_LOOK
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Measurement
from fp8tune.model.allocation import is_out_of_memory
from fp8tune.timing.accuracy import accuracy_of
from fp8tune.timing.memory import default_capture_bytes, peak_bytes
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay
from fp8tune.timing.sampling import Rounds, sample_until_clear

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.model.candidates import Sample
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock, Work
    from fp8tune.timing.replay import CompiledBodies

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
    compiled: CompiledBodies | None = None,
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
        compiled: functions that were compiled before, and those compiled now.

    Returns:
        The raw times, one record per recipe. A candidate that raises is left out and
        the others go on. Out of memory is tried again with random numbers, once captured
        tensors are released, and then reported as the failure "out_of_memory"; any other
        error is reported as "not_measured" with its message.
    """

    def attempt(sample: Sample, recipes: Sequence[Recipe]) -> dict[str, Measurement]:
        race = _Race(sample, recipes, clock, config, compile_options, compiled=kept)
        return {x.recipe: x for x in race.run(trace)}

    kept: CompiledBodies = {} if compiled is None else compiled
    sample = take()
    results = attempt(sample, recipes)
    again = [x for x in recipes if results[x.name].failure is Reason.OUT_OF_MEMORY]
    if again:
        release()
        sample = replace(sample, input=None, grad_output=None, weight=None, finite=True)
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
        *,
        compiled: CompiledBodies,
    ) -> None:
        self._sample = sample
        self._clock = clock
        self._config = config
        self._operands = Operands(sample)
        self._reference, *self._candidates = (
            Replay(self._operands, x, compile_options, config.context, compiled)
            for x in (None, *recipes)
        )
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
                self._time(trace)
        except Exception as error:  # noqa: BLE001 - measuring must not end training
            for candidate in self._running:
                self._fail(candidate, error)
        return list(self._known.values())

    def _time(self, trace: Callable[[Work, Work], None] | None) -> None:
        """Until all is clear; who is hopeless after a round leaves the others to it."""
        while self._running:
            rounds = self._timed()
            hopeless = rounds.hopeless(self._config)
            done = [x for i, x in enumerate(self._running, 1) if i in hopeless]
            if len(rounds.times) >= FIRST_LOOK or not done:
                done = list(self._running)
            if trace:  # after the timing, which a profiler would slow down
                for candidate in done:
                    trace(self._reference, candidate)
            for candidate in done:
                self._keep(candidate, rounds)
            self._running = [x for x in self._running if x not in done]

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
        if not self._sample.finite:  # random numbers would say nothing of the model's
            return Accuracy()
        budget = self._config.capture_bytes
        if budget is None:
            budget = default_capture_bytes(self._operands.device)
        try:
            return accuracy_of(candidate, budget)
        except Exception as error:
            logger.debug("no accuracy of %s", candidate.variant, exc_info=error)
            return None

    def _timed(self) -> Rounds:
        """Rounds of the reference and of those that are still running."""
        if not self._running:
            return Rounds(self._clock)
        try:
            return sample_until_clear(
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

    def _keep(self, candidate: Replay, rounds: Rounds) -> None:
        sample, place = self._sample, 1 + self._running.index(candidate)
        columns = [tuple(column) for column in zip(*rounds.times, strict=True)]
        self._known[candidate.variant] = replace(
            self._known[candidate.variant],
            reference_ms=columns[0],
            candidate_ms=columns[place],
            synthetic=sample.input is None or sample.grad_output is None,
            recorded=datetime.now(UTC).date().isoformat(),
            warm_up_s=self._warm_up_s,
            load=rounds.load(place),
        )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
