"""``fp8tune env``: what a measurement on this machine would be true of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fp8tune
from fp8tune.commands.answer import Answer, Screen
from fp8tune.commands.device import pick_device
from fp8tune.store.environment import describe_environment

if TYPE_CHECKING:
    import argparse

__all__ = ["answer"]


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """The fields that timings in a cache are found by, and this version."""
    del screen
    environment = dict(describe_environment(pick_device(arguments.device)))
    fields = {"fp8tune": fp8tune.__version__, **environment}
    width = max(map(len, fields))
    lines = [f"{name:<{width}}  {value}" for name, value in fields.items()]
    return Answer(lines, {"fp8tune": fp8tune.__version__, "environment": environment})
