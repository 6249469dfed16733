"""torch's FakeTensorMode, with a grouped GEMM that takes every dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["FakeMode"]


class FakeMode(FakeTensorMode):
    """Lets experts be of any dtype: torch's fake of the grouped GEMM takes bfloat16 alone.

    Not a dispatch mode of its own on top of FakeTensorMode, and not by
    ``__torch_dispatch__``, which torch wraps once more in a subclass: each operator would
    be dispatched in Python twice.
    """

    def dispatch(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch's own mode says, of one operator."""
        kwargs = kwargs or {}
        if func is not torch.ops.aten._grouped_mm.default:  # noqa: SLF001
            return super().dispatch(func, types, args, kwargs)
        narrow: Any = tree_map_only(torch.Tensor, _in_bfloat16, (args, kwargs))
        result: Any = super().dispatch(func, types, *narrow)
        return result.to(kwargs.get("out_dtype") or args[0].dtype)


def _in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor
