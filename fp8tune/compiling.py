"""torch.compile: what the user asked for, when it is applied, when it came too early."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fp8tune.config import Timing
from fp8tune.errors import CompiledTooEarlyError

__all__ = [
    "Compile",
    "apply_compile",
    "compile_options",
    "is_compiled",
    "refuse_compiling",
    "timing_name",
]

Compile = bool | Mapping[str, Any] | Callable[[nn.Module], Any]


def apply_compile(module: nn.Module, compile: Compile) -> Callable[..., Any]:
    """Compile as asked for.

    Returns:
        What to call for the model: the module itself, compiled in place, or the module
        that the user's callable returned.
    """
    if compile is False:
        return module
    if callable(compile):
        result = compile(module)
        return result if isinstance(result, nn.Module) else module
    module.compile(**(compile if isinstance(compile, Mapping) else {}))
    return module


def compile_options(compile: Compile, timing: Timing) -> dict[str, Any] | None:
    """Keyword arguments of torch.compile for timing one Linear; None is eager."""
    if timing is Timing.EAGER or (timing is Timing.AUTO and compile is False):
        return None
    return dict(compile) if isinstance(compile, Mapping) else {}


def timing_name(options: Mapping[str, Any] | None) -> str:
    """How Linears are timed, in words; timings of different names do not compare."""
    if options is None:
        return Timing.EAGER.value
    said = ", ".join(f"{name}={value!r}" for name, value in sorted(options.items()))
    return f"{Timing.COMPILED.value}({said})" if said else Timing.COMPILED.value


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(module) or module.compile() was called; both leave a mark.

    torch has no public question for it.
    """
    wrapped = type(module).__name__ == "OptimizedModule"
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


_TOO_EARLY = (
    "the model was called under torch.compile while fp8tune was still tuning it. Either "
    "give compile=True (a dict of options, a callable) to AutoFloat8, which compiles "
    "when the plan freezes, or train until auto.frozen (or call auto.freeze()) and "
    "compile then"
)


# Dynamo cannot trace a disabled function: it runs it for real, outside the graph, or
# quotes the reason where fullgraph=True forbids that.
@torch.compiler.disable(reason=_TOO_EARLY)  # pyright: ignore[reportUntypedFunctionDecorator]
def refuse_compiling() -> None:
    """Called where Dynamo must not trace.

    Raises:
        CompiledTooEarlyError: always.
    """
    raise CompiledTooEarlyError(_TOO_EARLY)
