"""What layers run as while they are watched: converted, or in high precision.

Converted is the default: the training run is then the float8 run from its first step. But
eagerly a Float8Linear needs more memory than its reference, which a run that only fits
compiled has not got. Capturing needs no conversion, so there the layers stay as they are.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from fp8tune.config import Warmup
from fp8tune.model.allocation import is_out_of_memory
from fp8tune.timing.memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from fp8tune.tuner.options import Options
    from fp8tune.tuner.pipeline import Pipeline

__all__ = ["WarmUp", "rows_of", "warmup_elements"]

# Most bytes that an eager rowwise Float8Linear holds in forward + backward, as a multiple
# of its input's; the same Linear in bfloat16 takes 3. Counted from torchao's float8_linear:
# its transposed, scaled and cast copies of input, weight and output gradient.
_EAGER_FLOAT8 = 11.5


class WarmUp:
    """Converts the candidates for the warm-up, unless that would not fit.

    Args:
        module: the model.
        pipeline: converts candidates.
        options: ``config.warmup``. Many ranks must warm up alike, and the first forward is
            no place for a collective, since a pipeline stage waits there for the one
            before; so "auto" looks at the memory of a single rank only.
        say: logs.
    """

    def __init__(
        self,
        module: nn.Module,
        pipeline: Pipeline,
        options: Options,
        say: Callable[[int, object], None],
    ) -> None:
        self._pipeline = pipeline
        self._say = say
        self._warmup = options.config.warmup
        self._handles = [module.register_forward_hook(self._ended, always_call=True)]
        looks = self._warmup is Warmup.AUTO and options.ranks.size == 1
        if looks and pipeline.device.type == "cuda":
            begins = module.register_forward_pre_hook(self._begins, with_kwargs=True)
            self._handles.append(begins)
        reference = self._warmup is Warmup.REFERENCE
        pipeline.convert([] if reference else [x.fqn for x in pipeline.candidates])

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begins(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not torch.is_grad_enabled():
            return
        self._handles.pop().remove()
        rows = rows_of((args, kwargs))
        linears = [x.linear for x in self._pipeline.candidates]
        itemsize = max((x.weight.itemsize for x in linears), default=0)
        sizes = [(x.in_features, x.out_features) for x in linears]
        needed = warmup_elements(sizes, rows) * itemsize
        free = free_bytes(self._pipeline.device)
        if needed > free:
            self._pipeline.convert([])
            self._say(
                logging.INFO,
                f"warming up in high precision: eager float8 layers would need about "
                f"{needed / 2**30:.1f} GiB for {rows} rows, and "
                f"{free / 2**30:.1f} GiB are free",
            )

    def _ended(self, module: nn.Module, args: object, output: object) -> None:
        del module, args
        error = sys.exc_info()[1] if output is None else None
        converted = self._warmup is not Warmup.REFERENCE
        if error is not None and converted and is_out_of_memory(error):
            self._say(
                logging.WARNING,
                "memory ran out in a forward of the warm-up, in which candidates run "
                'eagerly in float8; TuneConfig(warmup="reference") warms up in high '
                "precision, and capture_bytes=0 keeps no tensors for timing",
            )


def rows_of(arguments: object) -> int:
    """Rows (M) of what a model is called with: token ids, or features in the last dim."""
    tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    rows = [
        x.numel() // x.shape[-1] if x.is_floating_point() and x.dim() else x.numel()
        for x in tensors
        if x.numel()
    ]
    return max(rows, default=0)


def warmup_elements(sizes: Sequence[tuple[int, int]], rows: int) -> float:
    """What a forward + backward takes at its peak, in elements of the weights' dtype.

    Args:
        sizes: in_features and out_features of each candidate.
        rows: M of each.

    Returns:
        The inputs that are saved for backward, and what the widest layer holds besides.
    """
    saved = rows * sum(k for k, _ in sizes)
    widest = rows * max((max(size) for size in sizes), default=0)
    return saved + _EAGER_FLOAT8 * widest
