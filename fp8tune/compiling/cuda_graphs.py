"""Why single Linears are timed without CUDA graphs, whatever the model runs under.

A graph saves the CPU the launches, which the clock leaves out anyway; the kernels are the
same. But around one Linear it would cost what it does not cost inside a model: a copy of
the input and of the output gradient into the graph's own memory with each replay. And
graph trees belong to the whole process: another function that is recorded may overwrite
outputs that the user still holds, and ``torch.compiler.cudagraph_mark_step_begin()``,
once called, ends torch's own counting of iterations for good, on which a training loop
relies that never calls it.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from fp8tune.compiling.inductor import spelled_out

__all__ = ["uses_cuda_graphs", "without_cuda_graphs"]

_INDUCTOR = "inductor"
# The backend that records what it otherwise runs as this one does.
_BACKENDS = {"cudagraphs": "aot_eager"}


def without_cuda_graphs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same keyword arguments of torch.compile, CUDA graphs apart.

    Args:
        options: not changed. Whatever else ``mode`` stands for is kept.
    """
    backend = options.get("backend", _INDUCTOR)
    if backend != _INDUCTOR:
        replaced = _BACKENDS.get(backend) if isinstance(backend, str) else None
        return {**options, "backend": replaced or backend}
    plain = spelled_out(options)
    return {**plain, "options": {**plain["options"], "triton.cudagraphs": False}}


def uses_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether these keyword arguments of torch.compile ask for CUDA graphs."""
    backend = options.get("backend", _INDUCTOR)
    if backend != _INDUCTOR:
        return isinstance(backend, str) and backend in _BACKENDS
    config = importlib.import_module("torch._inductor.config")
    asked = spelled_out(options)["options"].get("triton.cudagraphs")
    return bool(config.triton.cudagraphs if asked is None else asked)
