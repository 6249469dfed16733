"""The command line. The only module that prints.

It imports as little as it can, so that ``fp8tune --help`` answers at once: the module of
a command, and with it torch or matplotlib, is imported when that command runs.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import fp8tune
from fp8tune.commands.answer import NoEntryError, Screen
from fp8tune.errors import Fp8TuneError

__all__ = ["main"]

_OK, _NO_ENTRY, _WRONG_USE, _INTERRUPTED = 0, 1, 2, 130

# The keys of fp8tune.export.TARGETS, which would import torch.
_TARGETS = ("accelerate", "automodel", "olmo", "torchao", "torchtitan")

_DESCRIPTION = "Look at what fp8tune timed and decided, and time one shape."
_EXIT_CODES = (
    "exit codes: 0 all went well, 1 there is no such entry, 2 the command cannot be "
    "carried out as it was given"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every error of the command line does."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None, **extra: Any) -> int:
    """Run one command.

    Args:
        arguments: what stands behind ``fp8tune``; None is the process's own arguments.
        extra: passed on to the command; ``clock`` for measure and sweep.

    Returns:
        The exit code.
    """
    _keep_going_on_odd_characters()
    parsed = _parser().parse_args(arguments)
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
        return _failed(parsed, problem, _WRONG_USE)
    return _OK


def _failed(parsed: argparse.Namespace, problem: Exception, code: int) -> int:
    text = " ".join(str(problem).split())
    print(f"fp8tune {parsed.command}: {text}", file=sys.stderr)
    return code


def _run(parsed: argparse.Namespace, extra: dict[str, Any]) -> int:
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


def _parser() -> _Parser:
    parser = _Parser(prog="fp8tune", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument(
        "--version", action="version", version=f"fp8tune {fp8tune.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        add(command)
        if name == "bench":  # whose JSON may go to a file
            continue
        command.add_argument(
            "--json", action="store_true", help="print JSON, as docs/schema describes"
        )
    return parser


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    _add_run(parser, "--run", "show this run only")
    parser.add_argument("--all", action="store_true", help="a row for every layer")
    _add_min_speedup(parser)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "fqn", metavar="FQN", help="name of a layer, such as layers.0.wq"
    )
    _add_run(parser, "--run", "of this run; else of the newest that has the layer")
    _add_min_speedup(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a cache file")
    _add_run(parser, "--run-a", "this run of A; else the newest")
    _add_run(parser, "--run-b", "this run of B; else the newest")
    parser.add_argument(
        "--all", action="store_true", help="also the layers that do not differ"
    )
    _add_min_speedup(parser)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    sizes = {"m": "rows", "k": "in_features", "n": "out_features"}
    for name, meaning in sizes.items():
        parser.add_argument(f"--{name}", type=_size, required=True, help=meaning)
    parser.add_argument("--recipe", default="rowwise", help="default: rowwise")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--bias", action="store_true", help="give the Linear a bias")
    parser.add_argument(
        "--compiled", action="store_true", help="time it under torch.compile"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=1.0, help="of timing at most; default: 1"
    )
    _add_min_speedup(parser)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    sizes = {"m": "rows", "k": "in_features", "n": "out_features"}
    for name, meaning in sizes.items():
        help = f"{meaning}, as 1024,2048; default: 1024 to 32768, on a CPU 16 to 512"
        parser.add_argument(f"--{name}", metavar="SIZES", type=_sizes, help=help)
    _add_setting(parser)
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=0.2,
        help="of timing per cell at most; default: 0.2",
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workload",
        metavar="NAME",
        action="append",
        default=[],
        help="a block by name, as llama3-8b or llama3-8b@2048; several, or all if none",
    )
    parser.add_argument("--m", type=_size, help="rows, instead of the workload's own")
    _add_setting(parser)
    seconds = {"max": (10.0, "of timing"), "max-compile": (60.0, "of compiling")}
    for name, (default, what) in seconds.items():
        help = f"{what} plans of a workload at most; default: {default:.0f}"
        parser.add_argument(f"--{name}-seconds", type=float, default=default, help=help)
    parser.add_argument(
        "--suite",
        choices=("gpu", "cost"),
        help="gpu: all that is to be known of a GPU, within ten minutes; cost: what "
        "tuning takes with a cold and a warm compile cache",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=True,
        default=False,
        help="print JSON, as docs/schema describes; with FILE write it there",
    )


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="rowwise", help="default: rowwise")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")


def _add_env(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def _add_forget(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "--older-than",
        metavar="AGE",
        help="only what is older than 30d, 8w, 2026-01-31",
    )
    parser.add_argument(
        "--env",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="only what was timed there, as torch=2.12.0 or 'device=*H100*'; several "
        "must all hold",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be forgotten"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cache", metavar="CACHE", help="a cache file, or what Plan.save wrote"
    )
    parser.add_argument(
        "--to",
        metavar="TARGET",
        required=True,
        choices=_TARGETS,
        help=", ".join(_TARGETS),
    )
    _add_run(parser, "--run", "of this run; else of the newest")
    _add_min_speedup(parser)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="a .png or .svg file"
    )
    _add_run(parser, "--run", "of this run; else of the newest")
    _add_min_speedup(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="a cache file")


def _add_run(parser: argparse.ArgumentParser, name: str, meaning: str) -> None:
    parser.add_argument(name, metavar="NUMBER", type=_size, help=meaning)


def _add_min_speedup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-speedup",
        metavar="FACTOR",
        type=float,
        default=1.0,
        help="decide as if TuneConfig.min_speedup were this; default: 1.0",
    )


def _size(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def _sizes(text: str) -> list[int]:
    return sorted({_size(part) for part in text.split(",")})


_COMMANDS = {
    "show": (_add_show, "the table of decisions of each run in a cache file"),
    "explain": (_add_explain, "the whole story of one decision"),
    "diff": (_add_diff, "what two runs decided differently"),
    "export": (_add_export, "a plan in the words of another trainer"),
    "plot": (_add_plot, "a picture of the speedups"),
    "measure": (_add_measure, "time one shape now"),
    "sweep": (_add_sweep, "torchao's M, K, N grid of speedups, timed on this device"),
    "bench": (_add_bench, "policies compared on blocks of published models"),
    "env": (_add_env, "what timings on this machine are true of"),
    "forget": (_add_forget, "take timings out of a cache file"),
}
