"""Timing all signatures of a run, one after the other: clock, random state, progress."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp8tune import report
from fp8tune.clock import Clock, clock_for
from fp8tune.measure import measure_all
from fp8tune.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fp8tune.capture import Capture
    from fp8tune.config import TuneConfig
    from fp8tune.recipes import Recipe
    from fp8tune.records import Layer, Measurement, Signature

__all__ = ["time_signatures"]

logger = logging.getLogger("fp8tune")


def time_signatures(
    wanted: Mapping[Signature, Sequence[Recipe]],
    capture: Capture,
    config: TuneConfig,
    *,
    device: torch.device,
    layers: Sequence[Layer] = (),
    clock: Clock | None = None,
    compile_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> Iterator[Measurement]:
    """Time each, and give it back as soon as it is timed, so that Ctrl-C loses little.

    Args:
        wanted: what to time, and the candidates of each.
        capture: the tensors that they were seen with.
        config: see ``measure``; and ``profile_dir``.
        device: where the model is; its random numbers are left as they were.
        layers: the model, for names to the traces.
        clock: what times the work; by default the device's own.
        compile_options: keyword arguments of torch.compile, or None to time eagerly.
        shown: False on ranks that say nothing, and trace nothing.

    Yields:
        One measurement per signature and candidate, in their order.
    """
    if not wanted:
        return
    clock = clock or clock_for(device)
    began, warm_up_s = clock.now(), 0.0
    trace = _tracer(config, layers) if shown else None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), Progress(len(wanted), shown=shown) as bar:
        for signature, recipes in wanted.items():
            bar.begin(report.describe_signature(signature))
            measurements = measure_all(
                partial(capture.sample, signature),
                recipes,
                clock,
                config,
                compile_options,
                release=capture.release_tensors,
                trace=trace,
            )
            bar.end(report.measurements_line(measurements, config))
            warm_up_s += measurements[0].warm_up_s
            yield from measurements
    if shown:
        seconds = clock.now() - began
        logger.info("%s", report.cost_line(len(wanted), seconds, warm_up_s))


def _tracer(config: TuneConfig, layers: Sequence[Layer]) -> Any:
    if config.profile_dir is None:
        return None
    # torch.profiler is imported only where it is wanted.
    from fp8tune.traces import Traces  # noqa: PLC0415

    return Traces(config.profile_dir, layers).record
