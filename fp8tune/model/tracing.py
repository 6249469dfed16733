"""Dynamo must not trace a model that is still being watched."""

import torch

from fp8tune.errors import CompiledTooEarlyError

__all__ = ["refuse_compiling"]

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
