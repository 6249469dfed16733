"""Profiler traces of what is timed, for TensorBoard's profiler plugin and for Perfetto.

One folder per signature and recipe, since the plugin calls a folder a run and reads it once::

    <profile_dir>/layers.0.wq-m8192-k4096-n1024-rowwise/
        raw.json.gz                             as torch.profiler wrote it
        fp8tune.1700000000000.pt.trace.json.gz  as the plugin reads it

The plugin (torch-tb-profiler 0.4.3) is older than today's traces. Its table of operators
knows neither annotations nor today's names for the category of kernel launches, without
which every device time is 0; so both are renamed in its copy.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fp8tune.decision.records import REFERENCE

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from fp8tune.decision.records import Layer
    from fp8tune.timing.clock import Work

__all__ = ["Traces", "for_plugin", "profiler_is_running", "write_trace"]

logger = logging.getLogger("fp8tune")

# Enough to tell a first call from the others, and few enough for a small file.
_REPEATS = 3
_RANGE = "fp8tune::"
_CANDIDATE = "candidate"


class Traces:
    """Records a trace of each pair of variants that is timed.

    Args:
        folder: where the folders of the traces go.
        layers: the model, for a name to each signature.
    """

    def __init__(self, folder: str | os.PathLike[str], layers: Sequence[Layer]) -> None:
        self._folder = Path(folder)
        # Reversed, so that the first layer of many wins.
        self._names = {
            signature: layer.fqn
            for layer in reversed(layers)
            for signature, _ in layer.calls
        }

    def record(self, reference: Work, candidate: Work) -> None:
        """Run both a few times under the profiler, and write what it saw.

        Whatever goes wrong costs a warning and the trace, never the training run.
        """
        signature = reference.signature
        if profiler_is_running():
            logger.warning(
                "a profiler is running already, so there is no trace of M=%d K=%d N=%d; "
                "tune outside of it, or leave out profile_dir",
                signature.shape.m,
                signature.shape.k,
                signature.shape.n,
            )
            return
        name = self._names.get(signature, "") or "root"
        try:
            trace = _profile(name, reference, candidate)
            write_trace(trace, self._folder, _folder_name(name, candidate))
        except Exception as problem:  # noqa: BLE001 - must not end a training run
            logger.warning("no trace of %s was written: %s", name, problem)


def _profile(name: str, reference: Work, candidate: Work) -> bytes:
    """A trace in Chrome's format, in which each call is a range."""
    wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    activities = wanted & set(torch.profiler.supported_activities())
    # On a thread of its own, backward would lie outside of the range.
    own_thread = torch.autograd.set_multithreading_enabled(False)
    # torch 2.11 warns where events are not to be accumulated, of which there are none.
    profiled = profile(activities=activities, record_shapes=True, acc_events=True)
    with own_thread, profiled as profiler:
        for _ in range(_REPEATS):
            for work, role in ((reference, REFERENCE), (candidate, _CANDIDATE)):
                with record_function(f"{_RANGE}{name}::{role}"):
                    work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


def write_trace(trace: bytes, folder: Path, name: str) -> Path:
    """Write both copies of a trace into a new folder.

    Args:
        trace: JSON in Chrome's format.
        folder: where the new folder goes; made if it is missing.
        name: of the new folder; a number is added if it is taken.

    Returns:
        The new folder.

    Raises:
        OSError: it cannot be written.
        ValueError: the trace is no JSON.
    """
    document = for_plugin(json.loads(trace))
    target = _new_folder(folder, name)
    (target / "raw.json.gz").write_bytes(gzip.compress(trace))
    # Under another name first: the plugin reads a file as soon as it sees it, and once.
    final = target / f"fp8tune.{time.time_ns()}.pt.trace.json.gz"
    partial = target / "partial.tmp"
    partial.write_bytes(gzip.compress(json.dumps(document).encode()))
    partial.replace(final)
    return target


def _new_folder(folder: Path, name: str) -> Path:
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    for each in names:
        with contextlib.suppress(FileExistsError):
            (folder / each).mkdir(parents=True)
            return folder / each
    raise AssertionError("there is always another number")


def _folder_name(name: str, work: Work) -> str:
    shape = work.signature.shape
    safe = re.sub(r"[^\w.-]", "_", name)[:100]
    return f"{safe}-m{shape.m}-k{shape.k}-n{shape.n}-{work.variant}"


def for_plugin(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with the categories that torch-tb-profiler 0.4.3 knows.

    Args:
        trace: in Chrome's format; not changed.
    """
    return {**trace, "traceEvents": [_renamed(x) for x in trace["traceEvents"]]}


def _renamed(event: dict[str, Any]) -> dict[str, Any]:
    category = str(event.get("cat", ""))
    if category.endswith(("_runtime", "_driver")):
        category = "runtime"
    if category == "user_annotation" and str(event.get("name")).startswith(_RANGE):
        category = "cpu_op"
    # The plugin gives up on a whole file for one complete event without a category.
    return {**event, "cat": category} if event.get("ph") == "X" else event


def profiler_is_running() -> bool:
    """Whether a profiler is on in this thread; starting a second one would end it.

    torch has no public question for it.
    """
    enabled = getattr(torch.autograd, "_profiler_enabled", None)
    return enabled is not None and bool(enabled())
