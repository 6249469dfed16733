"""The arguments of each command. Imports no command, so that --help answers at once."""

import argparse
from typing import NoReturn

import fp8tune
from fp8tune.commands import values

__all__ = ["WRONG_USE", "parser"]

# The exit code of what cannot be carried out as it was given.
WRONG_USE = 2

# The keys of fp8tune.plan.export.TARGETS, which would import torch.
_TARGETS = ("accelerate", "automodel", "megatron", "olmo", "torchao", "torchtitan")

_SIZES = {"m": "rows", "k": "in_features", "n": "out_features"}

_DESCRIPTION = "Look at what fp8tune timed and decided, and time one shape."
_EXIT_CODES = (
    "exit codes: 0 all went well, 1 there is no such entry, 2 the command cannot be "
    "carried out as it was given"
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every error of the command line does."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
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
    _add_html(parser, "this run, or the newest")
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
    _add_html(parser, "both runs, side by side")
    _add_min_speedup(parser)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    for name, meaning in _SIZES.items():
        parser.add_argument(f"--{name}", type=values.size, required=True, help=meaning)
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
    for name, meaning in _SIZES.items():
        help = f"{meaning}, as 1024,2048; default: 1024 to 32768, on a CPU 16 to 512"
        parser.add_argument(f"--{name}", metavar="SIZES", type=values.sizes, help=help)
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
    parser.add_argument(
        "--m", type=values.size, help="rows, instead of the workload's own"
    )
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
    _add_output(parser, "a .png or .svg file", required=True)
    _add_run(parser, "--run", "of this run; else of the newest")
    _add_min_speedup(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    named = "MODULE:FUNCTION"
    parser.add_argument("model", metavar=named, nargs="?", help="returns the model")
    parser.add_argument(
        "--hf", metavar="CONFIG", help="the model of this config.json of Transformers"
    )
    parser.add_argument(
        "--parallelize",
        metavar=named,
        help="splits the model; gets it and a mesh. --hf splits by the model's own plan",
    )
    parser.add_argument(
        "--mesh",
        type=values.mesh,
        default=1,
        metavar="SIZES",
        help="ranks of the run by name, outermost first, as dp=32,tp=8; default: one",
    )
    parser.add_argument(
        "--batch",
        metavar="SHAPE",
        type=values.shape,
        help="what one rank calls the model with, as 2x8192: ids of tokens, or if it "
        "has no nn.Embedding activations; 8x3x224x224 of pixels, if --hf takes these",
    )
    parser.add_argument(
        "--tokens", type=values.size, help="the same as --batch 1xTOKENS"
    )
    parser.add_argument(
        "--filter",
        metavar="NAME",
        action="append",
        default=[],
        help="leave out Linears with this in their name; several",
    )
    _add_setting(parser)
    parser.add_argument(
        "--cache", metavar="CACHE", help="a cache file, to be filled for the run"
    )
    _add_output(parser, "write the plan there")
    parser.add_argument(
        "--no-device",
        action="store_true",
        help="time nothing: what a published table lets expect, for rowwise",
    )
    parser.add_argument(
        "--trust-prior",
        action="store_true",
        help="skip what the cache's other shapes or a published table make clear",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=1.0,
        help="of timing per signature at most; default: 1",
    )
    _add_min_speedup(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cache", metavar="CACHE", help="a cache file")


def _add_run(parser: argparse.ArgumentParser, name: str, meaning: str) -> None:
    parser.add_argument(name, metavar="NUMBER", type=values.size, help=meaning)


def _add_output(
    parser: argparse.ArgumentParser, help: str, *, required: bool = False
) -> None:
    flags, kind = ("-o", "--output"), values.new_file
    parser.add_argument(*flags, metavar="FILE", type=kind, required=required, help=help)


def _add_html(parser: argparse.ArgumentParser, what: str) -> None:
    help = f"write a page of one file that shows {what}"
    parser.add_argument("--html", metavar="FILE", type=values.new_file, help=help)


def _add_min_speedup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-speedup",
        metavar="FACTOR",
        type=float,
        default=1.0,
        help="decide as if TuneConfig.min_speedup were this; default: 1.0",
    )


_COMMANDS = {
    "show": (_add_show, "the table of decisions of each run in a cache file"),
    "explain": (_add_explain, "the whole story of one decision"),
    "diff": (_add_diff, "what two runs decided differently"),
    "export": (_add_export, "a plan in the words of another trainer"),
    "plot": (_add_plot, "a picture of the speedups"),
    "plan": (_add_plan, "a plan before training begins, for any layout"),
    "measure": (_add_measure, "time one shape now"),
    "sweep": (_add_sweep, "torchao's M, K, N grid of speedups, timed on this device"),
    "bench": (_add_bench, "policies compared on blocks of published models"),
    "env": (_add_env, "what timings on this machine are true of"),
    "forget": (_add_forget, "take timings out of a cache file"),
}
