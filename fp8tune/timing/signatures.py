"""Timing all signatures of a run, one after the other: clock, random state, progress."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.report import messages
from fp8tune.report.describe import describe_signature
from fp8tune.report.progress import Progress
from fp8tune.timing.apart import StoppableClock, apart
from fp8tune.timing.clocks import clock_for
from fp8tune.timing.compile_first import compile_variants
from fp8tune.timing.gemms import measure_with_parts

if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from fp8tune.config import TuneConfig
    from fp8tune.decision.records import Layer, Measurement, Signature
    from fp8tune.model.capture import Capture
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock
    from fp8tune.timing.replay import CompiledBodies

__all__ = ["compile_signatures", "time_signatures"]

logger = logging.getLogger("fp8tune")


def compile_signatures(
    wanted: Mapping[Signature, Sequence[Recipe]],
    capture: Capture,
    config: TuneConfig,
    *,
    device: torch.device,
    clock: Clock | None,
    compile_options: Mapping[str, Any],
    compiled: CompiledBodies,
    shown: bool = True,
) -> None:
    """Compile each and keep the functions, so that timing finds them.

    Args:
        wanted: what will be timed, in this order; for the others see ``time_signatures``.
        capture: the tensors that they were seen with.
        config: what surrounds a Linear while it is timed.
        device: where the model is.
        clock: what will time them.
        compile_options: keyword arguments of torch.compile.
        compiled: gets the compiled functions.
        shown: False on ranks that say nothing.
    """
    with _set_up(wanted, capture, _Clocks(clock), device, shown=shown) as (bar, run):
        for signature, recipes in wanted.items():
            described = describe_signature(signature)
            bar.begin(f"compiling {described}")
            run(
                compile_variants,
                signature,
                recipes,
                config,
                compile_options,
                compiled=compiled,
            )
            bar.end(f"compiled {described}")


def time_signatures(
    wanted: Mapping[Signature, Sequence[Recipe]],
    capture: Capture,
    config: TuneConfig,
    *,
    device: torch.device,
    layers: Sequence[Layer] = (),
    clock: Clock | None = None,
    compile_options: Mapping[str, Any] | None = None,
    compiled: CompiledBodies | None = None,
    shown: bool = True,
) -> Iterator[Measurement]:
    """Time each, and give it back as soon as it is timed, so that Ctrl-C loses little.

    Args:
        wanted: what to time, and the candidates of each.
        capture: the tensors that they were seen with.
        config: see ``measure``; and ``profile_dir``.
        device: where the model is; its random numbers are left as they were.
        layers: the model, for names to the traces.
        clock: what times the work; by default each device's own.
        compile_options: keyword arguments of torch.compile, or None to time eagerly.
        compiled: what ``compile_signatures`` compiled before.
        shown: False on ranks that say nothing, and trace nothing.

    Yields:
        One measurement per signature and candidate, in their order, parts of candidates
        last.
    """
    if not wanted:
        return
    clocks = _Clocks(clock)
    first = clocks.of(device)
    began, warm_up_s = first.now(), 0.0
    trace = _tracer(config, layers) if shown else None
    with _set_up(wanted, capture, clocks, device, shown=shown) as (bar, run):
        for signature, recipes in wanted.items():
            bar.begin(describe_signature(signature))
            measurements = run(
                measure_with_parts,
                signature,
                recipes,
                config,
                compile_options,
                release=capture.release_tensors,
                trace=trace,
                compiled=compiled,
            )
            bar.end(messages.measurements_line(measurements, config))
            warm_up_s += measurements[0].warm_up_s
            yield from measurements
    if shown:
        seconds = first.now() - began
        logger.info("%s", messages.cost_line(len(wanted), seconds, warm_up_s))


@contextmanager
def _set_up(
    wanted: Iterable[Signature],
    capture: Capture,
    clocks: _Clocks,
    device: torch.device,
    *,
    shown: bool,
) -> Generator[tuple[Progress, Callable[..., Any]]]:
    """Around the work with all signatures: random state, progress, a thread of its own.

    Yields:
        The progress, and run(function, signature, recipes, ...), which calls function(take,
        recipes, clock, ...) in the thread.
    """
    places = {capture.device_of(x) for x in wanted} | {device}
    stop = threading.Event()
    with (
        torch.random.fork_rng([x for x in places if x.type == "cuda"]),
        Progress(len(list(wanted)), shown=shown) as bar,
        apart(stop) as call,
    ):

        def run(
            function: Callable[..., Any],
            signature: Signature,
            recipes: Sequence[Recipe],
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            timer = StoppableClock(clocks.of(capture.device_of(signature)), stop)
            take = partial(capture.sample, signature)
            return call(function, take, recipes, timer, *args, **kwargs)

        yield bar, run


class _Clocks:
    """The clock that was given, or one for each device that layers are on."""

    def __init__(self, given: Clock | None) -> None:
        self._given = given
        self._known: dict[torch.device, Clock] = {}

    def of(self, device: torch.device) -> Clock:
        if self._given:
            return self._given
        if device not in self._known:
            self._known[device] = clock_for(device)
        return self._known[device]


def _tracer(config: TuneConfig, layers: Sequence[Layer]) -> Any:
    if config.profile_dir is None:
        return None
    # torch.profiler is imported only where it is wanted.
    from fp8tune.timing.traces import Traces  # noqa: PLC0415

    return Traces(config.profile_dir, layers).record
