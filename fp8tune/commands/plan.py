"""``fp8tune plan``: a plan for a model, of any layout, on the device at hand."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8tune.commands.answer import Answer, Screen, layer_data
from fp8tune.commands.device import pick_device
from fp8tune.config import TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.errors import ConfigError, in_short
from fp8tune.report.columns import paragraph
from fp8tune.report.expected import Outlook, expected_lines, outlooks
from fp8tune.report.messages import AHEAD_LINE
from fp8tune.report.table import table_lines
from fp8tune.store.tables import published_table
from fp8tune.tuner.ahead import layers_ahead, plan_ahead

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from fp8tune.plan.plan import Plan
    from fp8tune.timing.clock import Clock

__all__ = ["answer"]


@dataclass(frozen=True)
class _Subject:
    """What is planned for: how it is made, split and called."""

    build: Callable[[], Any]
    parallelize: Any
    batch: Any


def answer(
    arguments: argparse.Namespace, screen: Screen, clock: Clock | None = None
) -> Answer:
    """The table of the plan, which ``arguments.output`` gets as a file.

    Raises:
        ConfigError: arguments that do not fit together, or name nothing.
        ModelError: the model cannot be planned for.
        OSError: the plan cannot be written.
    """
    if arguments.no_device:
        return _expected(arguments, screen)
    device = pick_device(arguments.device)
    subject = _subject(arguments)
    plan = plan_ahead(
        subject.build,
        subject.batch,
        recipe=arguments.recipe,
        parallelize=subject.parallelize,
        world=arguments.mesh,
        device=device,
        compile=not arguments.eager,
        cache=arguments.cache,
        filter_fqns=arguments.filter,
        config=TuneConfig(
            min_speedup=arguments.min_speedup,
            max_seconds=arguments.max_seconds,
            trust_prior=arguments.trust_prior,
        ),
        clock=clock,
    )
    lines = [*table_lines(plan, screen.width), *paragraph(AHEAD_LINE, screen.width)]
    if arguments.output:
        plan.save(arguments.output)
        lines += paragraph(f"wrote {arguments.output}", screen.width)
    return Answer(lines, _data(plan, arguments.output))


def _expected(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """What a published table lets expect, with nothing timed."""
    for name in ("output", "cache", "device", "trust_prior"):
        if getattr(arguments, name):
            raise ConfigError(
                f"--no-device times nothing, so there is no use for "
                f"--{name.replace('_', '-')}; leave "
                "either out"
            )
    table = published_table(arguments.recipe)
    if table is None:
        raise ConfigError(
            f"no table is published for {arguments.recipe!r}, only for rowwise; leave "
            "--no-device out and have the layers timed"
        )
    subject = _subject(arguments)
    layers = layers_ahead(
        subject.build,
        subject.batch,
        recipe=arguments.recipe,
        parallelize=subject.parallelize,
        world=arguments.mesh,
        filter_fqns=arguments.filter,
    )
    found = outlooks(layers, table, arguments.min_speedup)
    return Answer(
        expected_lines(found, table, screen.width),
        {
            "recipe": table.recipe,
            "emulated": False,
            "timing": "expected, not timed",
            "environment": {"device": table.device, "source": table.source},
            "output": None,
            "layers": [_expected_data(x) for x in found],
        },
    )


def _expected_data(outlook: Outlook) -> dict[str, Any]:
    decision, speedup, verdict = outlook
    low, middle, high = speedup or (None, None, None)
    numbers = {"speedup": middle, "speedup_low": low, "speedup_high": high}
    named = {"fqn": decision.fqn} | layer_data(decision)
    return named | numbers | {"expected": verdict}


def _data(plan: Plan, output: str | None) -> dict[str, Any]:
    expected = {Reason.EXPECTED_FASTER: "faster", Reason.EXPECTED_SLOWER: "slower"}
    return {
        "recipe": plan.recipe,
        "emulated": plan.emulated,
        "timing": plan.timing,
        "environment": dict(plan.environment),
        "output": output,
        "layers": [
            {"fqn": x.fqn} | layer_data(x) | {"expected": expected.get(x.reason)}
            for x in plan.decisions
        ],
    }


def _shape(arguments: argparse.Namespace) -> tuple[int, ...]:
    if (arguments.batch is None) == (arguments.tokens is None):
        raise ConfigError(
            "what one rank calls the model with must be given once: as --batch 2x8192, or "
            "as --tokens 16384"
        )
    return arguments.batch or (1, arguments.tokens)


def _subject(arguments: argparse.Namespace) -> _Subject:
    return _from_config(arguments) if arguments.hf else _from_function(arguments)


def _from_config(arguments: argparse.Namespace) -> _Subject:
    if arguments.model or arguments.parallelize:
        raise ConfigError(
            "--hf builds the model and splits it; give either it or MODULE:FUNCTION"
        )
    shape = _shape(arguments)
    from fp8tune.integrations import configs  # noqa: PLC0415 - imports transformers

    config = configs.load_config(arguments.hf)
    return _Subject(
        partial(configs.model_of, config),
        configs.parallelize,
        configs.inputs_of(config, shape),
    )


def _from_function(arguments: argparse.Namespace) -> _Subject:
    if not arguments.model:
        raise ConfigError(
            "which model is not said; give MODULE:FUNCTION, which returns it, or --hf "
            "with the config.json of a model of Transformers"
        )
    shape = _shape(arguments)
    split = arguments.parallelize
    return _Subject(_find(arguments.model), _find(split) if split else None, shape)


def _find(name: str) -> Any:
    """What ``package.module:function`` names, from here or installed."""
    module, _, function = name.partition(":")
    if not (module and function):
        raise ConfigError(f"{name!r} names no function; give it as MODULE:FUNCTION")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - what sys.path has are strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        raise ConfigError(
            f"{name!r} cannot be imported ({in_short(error)}); it must be a function in "
            "a module of this folder, or in an installed one"
        ) from error
