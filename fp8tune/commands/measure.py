"""``fp8tune measure``: time one shape now, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8tune.commands.answer import Answer, NoEntryError, Screen, layer_data
from fp8tune.commands.device import pick_device
from fp8tune.config import TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.records import Decision, Layer, Measurement, Shape, Signature
from fp8tune.errors import ConfigError
from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.candidates import Sample
from fp8tune.recipes.registry import get_recipe
from fp8tune.report.columns import paragraph
from fp8tune.report.messages import measurement_line
from fp8tune.store.codec import encode
from fp8tune.timing.clocks import clock_for
from fp8tune.timing.measure import measure

if TYPE_CHECKING:
    import argparse

    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock

__all__ = ["answer", "decide_alone", "lone_sample"]


def answer(
    arguments: argparse.Namespace, screen: Screen, clock: Clock | None = None
) -> Answer:
    """Forward + backward of one Linear, in high precision and with the recipe.

    Raises:
        ConfigError: the recipe is unknown, or does not take the shape.
        NoEntryError: it could not be timed.
    """
    device = pick_device(arguments.device)
    recipe = get_recipe(arguments.recipe, device)
    config = TuneConfig(
        min_speedup=arguments.min_speedup, max_seconds=arguments.max_seconds
    )
    sizes = arguments.m, arguments.k, arguments.n
    sample = lone_sample(sizes, recipe, device, bias=arguments.bias)
    options = {} if arguments.compiled else None
    measured = measure(sample, recipe, clock or clock_for(device), config, options)
    if measured.failure is not None:
        raise NoEntryError(measurement_line(measured, config))
    decision = decide_alone(measured, config)
    emulated = " (emulated: no times of float8 hardware)" if recipe.emulated else ""
    text = measurement_line(measured, config) + emulated
    verdict = decision.recipe or "high precision"
    lines = [
        *paragraph(text, screen.width),
        *paragraph(f"{verdict}: {decision.reason.sentence}", screen.width),
    ]
    data = {
        "signature": encode(sample.signature),
        "emulated": recipe.emulated,
        "reference_ms": list(measured.reference_ms),
        "candidate_ms": list(measured.candidate_ms),
        "decision": layer_data(decision),
    }
    return Answer(lines, data)


def decide_alone(measured: Measurement, config: TuneConfig) -> Decision:
    """What becomes of a model that is one Linear with this measurement."""
    signature = measured.signature
    shape = signature.shape
    calls = ((signature, 1),)
    layer = Layer("", shape.k, shape.n, shape.weight_dtype, True, None, calls)
    (decision,) = decide([layer], [measured], [measured.recipe], config)
    return decision


def lone_sample(
    sizes: tuple[int, int, int],
    recipe: Recipe,
    device: torch.device,
    *,
    bias: bool = False,
) -> Sample:
    """A Linear of its own, to be timed on random numbers.

    Args:
        sizes: M, K, N.
        recipe: what it will be timed with; its reference is the dtype.
        device: where it is made.
        bias: whether it has one.

    Raises:
        ConfigError: the recipe does not take the shape.
        NoEntryError: the weight does not fit into memory.
    """
    m, k, n = sizes
    linear = _linear(k, n, recipe, device, bias=bias)
    reason = recipe.supports(linear)
    if reason:
        raise ConfigError(f"{recipe.name} does not take K={k} N={n}: {reason.sentence}")
    dtype = recipe.reference
    shape = Shape(m, k, n, dtype, dtype, None, bias)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=bias)
    return Sample(signature, linear, None, None)


def _linear(
    k: int, n: int, recipe: Recipe, device: torch.device, *, bias: bool
) -> nn.Linear:
    dtype: torch.dtype = getattr(torch, recipe.reference)
    try:
        return nn.Linear(k, n, bias=bias, device=device, dtype=dtype)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NoEntryError(
            f"a weight of {n} x {k} does not fit into the memory of {device}"
        ) from None
