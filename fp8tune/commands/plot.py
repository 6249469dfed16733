"""``fp8tune plot``: the speedups of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fp8tune.commands.answer import (
    Answer,
    Screen,
    newest_run,
    require_runs,
    run_data,
)
from fp8tune.errors import ConfigError

if TYPE_CHECKING:
    import argparse

__all__ = ["answer"]

_SUFFIXES = (".png", ".svg")


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """Write the picture.

    Raises:
        ConfigError: the file's name ends otherwise, or matplotlib is missing.
        NoEntryError: the file has no run, or not the one that is asked for.
    """
    del screen
    output = Path(arguments.output)
    if output.suffix not in _SUFFIXES:
        raise ConfigError(
            f"-o is {arguments.output!r}; its name must end in {' or '.join(_SUFFIXES)}"
        )
    runs = require_runs(arguments.cache, arguments.min_speedup)
    run = newest_run(runs, arguments.run, arguments.cache)
    try:
        from fp8tune.report import plot  # noqa: PLC0415 - matplotlib is an extra
    except ImportError as error:
        raise ConfigError(
            f'{error}; install what plots need with pip install "fp8tune[plot]"'
        ) from None
    key = run.key
    title = plot.title_of(key.environment, key.label, key.timing, emulated=run.emulated)
    figure = plot.picture(
        run.decisions, run.by_signature, title, run.config.min_speedup, run.trial
    )
    plot.save(figure, output)
    timed = sum(x.speedup is not None for x in run.decisions)
    data = {"file": arguments.output, "run": run_data(run), "layers": timed}
    return Answer([f"wrote {arguments.output}: {timed} layers with a speedup"], data)
