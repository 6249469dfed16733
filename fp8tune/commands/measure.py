"""``fp8tune measure``: time one shape now, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8tune.clock import Clock, clock_for
from fp8tune.codec import encode
from fp8tune.columns import paragraph
from fp8tune.commands.answer import Answer, NoEntryError, Screen, layer_data
from fp8tune.commands.device import pick_device
from fp8tune.config import TuneConfig
from fp8tune.decide import decide
from fp8tune.errors import ConfigError
from fp8tune.measure import measure
from fp8tune.memory import is_out_of_memory
from fp8tune.recipes import Recipe, get_recipe
from fp8tune.records import Layer, Sample, Shape, Signature
from fp8tune.report import measurement_line

if TYPE_CHECKING:
    import argparse

__all__ = ["answer"]


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
    sample = _sample(arguments, recipe, device)
    options = {} if arguments.compiled else None
    measured = measure(sample, recipe, clock or clock_for(device), config, options)
    if measured.failure is not None:
        raise NoEntryError(measurement_line(measured, config))
    layer = Layer(
        "",
        arguments.k,
        arguments.n,
        recipe.reference,
        True,
        None,
        ((sample.signature, 1),),
    )
    (decision,) = decide([layer], [measured], [recipe.name], config)
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


def _sample(
    arguments: argparse.Namespace, recipe: Recipe, device: torch.device
) -> Sample:
    linear = _linear(arguments, recipe, device)
    reason = recipe.supports(linear)
    if reason:
        raise ConfigError(
            f"{recipe.name} does not take K={arguments.k} N={arguments.n}: "
            f"{reason.sentence}"
        )
    dtype = recipe.reference
    shape = Shape(
        arguments.m, arguments.k, arguments.n, dtype, dtype, None, arguments.bias
    )
    signature = Signature(
        shape, grad_input=True, grad_weight=True, grad_bias=arguments.bias
    )
    return Sample(signature, linear, None, None)


def _linear(
    arguments: argparse.Namespace, recipe: Recipe, device: torch.device
) -> nn.Linear:
    dtype: torch.dtype = getattr(torch, recipe.reference)
    sizes = arguments.k, arguments.n
    try:
        return nn.Linear(*sizes, bias=arguments.bias, device=device, dtype=dtype)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NoEntryError(
            f"a weight of {arguments.n} x {arguments.k} does not fit into the memory "
            f"of {device}"
        ) from None
