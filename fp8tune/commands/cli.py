"""The command line. The only module that prints.

It imports as little as it can, so that ``fp8tune --help`` answers at once: the module of
a command, and with it torch or matplotlib, is imported when that command runs.
"""

import importlib
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from fp8tune.commands.answer import NoEntryError, Screen
from fp8tune.commands.arguments import WRONG_USE, parser
from fp8tune.errors import Fp8TuneError

__all__ = ["main"]

_OK, _NO_ENTRY, _INTERRUPTED = 0, 1, 130


def main(arguments: Sequence[str] | None = None, **extra: Any) -> int:
    """Run one command.

    Args:
        arguments: what stands behind ``fp8tune``; None is the process's own arguments.
        extra: passed on to the command; ``clock`` for measure and sweep.

    Returns:
        The exit code.
    """
    _keep_going_on_odd_characters()
    parsed = parser().parse_args(arguments)
    try:
        return _run(parsed, extra)
    except BrokenPipeError:  # as in `fp8tune show cache.json | head`
        # Python flushes stdout once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _INTERRUPTED
    except NoEntryError as problem:
        return _failed(parsed, problem, _NO_ENTRY)
    except (Fp8TuneError, OSError) as problem:
        return _failed(parsed, problem, WRONG_USE)
    return _OK


def _failed(parsed: Namespace, problem: Exception, code: int) -> int:
    text = " ".join(str(problem).split())
    print(f"fp8tune {parsed.command}: {text}", file=sys.stderr)
    return code


def _run(parsed: Namespace, extra: dict[str, Any]) -> int:
    command = importlib.import_module(f"fp8tune.commands.{parsed.command}")
    screen = Screen(shutil.get_terminal_size().columns, _has_colours())
    answer = command.answer(parsed, screen, **extra)
    if parsed.json is True:
        print(json.dumps(answer.data))
    else:
        print("\n".join(answer.lines))
    sys.stdout.flush()
    return _INTERRUPTED if answer.interrupted else _OK


def _has_colours() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _keep_going_on_odd_characters() -> None:
    """A name that the terminal cannot show is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
