"""What each candidate would be called with: one training pass on fake tensors.

The hooks are those of the warmup (``fp8tune.model.capture``), on a copy of the model that
has shapes and no values. So it takes no memory, no other rank and no weights, and leaves
the model, its gradients and random numbers as they are. Hooks of the user are copied with
the model and run once: one that writes to something outside of the model writes there.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.errors import ModelError, in_short
from fp8tune.model.capture import Capture
from fp8tune.model.experts import GroupedLinear
from fp8tune.model.fakes import Fakes
from fp8tune.model.outputs import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn

    from fp8tune.model.candidates import Candidate

__all__ = ["dry_run"]

_WHY = (
    "the model does not run on fake tensors, which have shapes and no values ({error}); "
    "check the batch, and that the sizes of the mesh divide those of the model; where its "
    "course depends on values let AutoFloat8 tune in the training run instead"
)


# Logs the traceback of what is raised here in words.
_FAKE_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


def dry_run(
    module: nn.Module,
    candidates: Sequence[Candidate],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device | None = None,
) -> Capture:
    """One forward and backward, in the mode and autocast of the caller.

    Args:
        module: the model, on any device, the meta device included; sharded or not.
        candidates: its layers that are watched.
        args: what it is called with; only shapes, strides and dtypes count.
        kwargs: the same, by name.
        device: where all of it would be; None leaves each tensor on its own device.

    Returns:
        What was captured; it is closed, and has no tensors.

    Raises:
        ModelError: the model cannot be copied or run without values, or returns nothing
            that could be differentiated.
    """
    fakes = Fakes(device)
    _FAKE_LOGGER.addFilter(_nothing)
    try:
        faked, copy_of = fakes.module(module)
        inputs = fakes.tree((tuple(args), dict(kwargs)))
        watched = [replace(x, linear=_copy(x.linear, copy_of)) for x in candidates]
        capture = Capture(faked, watched, 0)
        with fakes.mode, _uncached_autocast(), _no_anomalies(), torch.enable_grad():
            differentiated = _train(faked, *inputs)
    except Exception as error:
        raise ModelError(_WHY.format(error=in_short(error))) from error
    finally:
        _FAKE_LOGGER.removeFilter(_nothing)
    capture.close()
    if not differentiated:
        raise ModelError(
            "the model returned no tensor that depends on a trained weight, so there is "
            "no backward to plan for; call it as training does, in training mode"
        )
    return capture


def _copy(linear: nn.Linear, copy_of: Callable[[Any], Any]) -> nn.Linear:
    if isinstance(linear, GroupedLinear):
        return GroupedLinear(copy_of(linear.owner), linear.parameter)
    return copy_of(linear)


def _nothing(record: logging.LogRecord) -> bool:
    del record
    return False


def _train(faked: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    output = faked(*args, **kwargs)
    found = {id(x): x for x in tensors_in(output) if x.grad_fn is not None}
    roots = list(found.values())
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(x) for x in roots])
    return bool(roots)


@contextmanager
def _uncached_autocast() -> Generator[None]:
    """Autocast goes on, but keeps no fake weight in the caller's cache."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _no_anomalies() -> AbstractContextManager[Any]:
    """Anomaly detection looks for NaN among values."""
    check = torch.is_anomaly_check_nan_enabled()
    return torch.autograd.set_detect_anomaly(mode=False, check_nan=check)
