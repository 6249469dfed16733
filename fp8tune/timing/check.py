"""The accuracy of converted layers on a batch, seen in one forward of the whole model."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.called import call_of, signature_of
from fp8tune.model.candidates import Sample
from fp8tune.model.sharding import to_local
from fp8tune.timing.accuracy import accuracy_of, decibels
from fp8tune.timing.apart import apart
from fp8tune.timing.casts import noise_of_typical_lines
from fp8tune.timing.operands import Operands
from fp8tune.timing.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from fp8tune.model.called import Call
    from fp8tune.recipes.recipe import Recipe

__all__ = ["Checked", "check_accuracy"]

logger = logging.getLogger("fp8tune")


@dataclass(frozen=True)
class Checked:
    """A converted layer that is to be measured.

    Attributes:
        fqn: its name.
        linear: the layer.
        recipe: what it is converted to.
        grad_input: whether training differentiates its input.
    """

    fqn: str
    linear: nn.Linear
    recipe: Recipe
    grad_input: bool


def check_accuracy(
    layers: Sequence[Checked], run: Callable[[], object], budget_bytes: int
) -> dict[str, float]:
    """The lowest SQNR of each layer that the forward calls.

    That of its output and gradients, or that of the typical row or column of its input
    or weight as they are cast, which falls where an outlier leaves the others no range.
    Input and weight are those of the call; random numbers stand in for the gradient of
    the output, which a forward does not have.

    Args:
        layers: what to measure.
        run: calls the model, eagerly, without gradients.
        budget_bytes: see ``accuracy_of``.

    Returns:
        SQNR in dB by name; layers that are not called, or of which nothing is known, as
        where the input holds inf or NaN, are missing.
    """
    found: dict[str, float] = {}
    with apart(threading.Event()) as call:

        def called(
            layer: Checked,
            linear: nn.Linear,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: torch.Tensor,
        ) -> None:
            del output
            inputs = call_of(linear, args, kwargs)
            if inputs.input.numel() == 0:
                return
            sample = _sample(layer, linear, inputs)
            worst = call(_worst_db, sample, layer.recipe, budget_bytes)
            if worst is not None:
                found[layer.fqn] = min(worst, found.get(layer.fqn, worst))

        handles = [
            x.linear.register_forward_hook(
                partial(called, x), with_kwargs=True, prepend=True
            )
            for x in layers
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
    return found


def _sample(layer: Checked, linear: nn.Linear, inputs: Call) -> Sample:
    signature = replace(
        signature_of(linear, inputs, recompute=False),
        grad_input=layer.grad_input,
        grad_weight=linear.weight.requires_grad,
    )
    tensor = to_local(inputs.input)
    routings = () if inputs.offs is None else (inputs.offs,)
    return Sample(signature, linear, tensor, None, routings=routings)


def _worst_db(sample: Sample, recipe: Recipe, budget_bytes: int) -> float | None:
    replay = Replay(Operands(sample), recipe, None)
    try:
        with torch.enable_grad():
            worst = accuracy_of(replay, budget_bytes).worst_db
        if worst is None:  # as where the input holds inf or NaN
            return None
        noise = noise_of_typical_lines(replay, budget_bytes)
        return worst if noise is None else min(worst, decibels(1.0, noise))
    except Exception as error:
        if is_out_of_memory(error) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.debug("no accuracy of %s", sample.signature, exc_info=error)
        return None
