"""What recipes share that are built on prototypes of torchao."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fp8tune.errors import ConfigError
from fp8tune.recipes.empty import has_no_rows, linear_without_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["load", "on_padded_rows"]


def load(home: str, names: Sequence[str], recipe: str, needed: str) -> Any:
    """A module of torchao's prototypes, which may move with any release.

    Args:
        home: the module.
        names: all that is used of it.
        recipe: whose it is, for the error.
        needed: the most important of the names, for the error.

    Raises:
        ConfigError: it is not there, or lacks one of the names.
    """
    try:
        module = importlib.import_module(home)
        for name in names:
            getattr(module, name)
    except (ImportError, AttributeError) as error:
        found = importlib.metadata.version("torchao")
        raise ConfigError(
            f"{recipe} needs {needed}, a prototype of torchao 0.18; torchao {found} has "
            f"no such class, or another one ({error}). Install torchao 0.18, or choose "
            "another recipe"
        ) from error
    return module


def on_padded_rows(
    linear: nn.Linear,
    input: torch.Tensor,
    multiple: int,
    gemm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A Linear whose GEMM wants contiguous rows of one dtype, a multiple of so many.

    Args:
        linear: has weight (N, K) and perhaps a bias, which is added outside.
        input: (*, K), of any layout; autocast is heeded.
        multiple: rows of zeros are added until M is one of it.
        gemm: (M, K), (N, K) -> (M, N).

    Returns:
        (*, N).
    """
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input = input.to(torch.get_autocast_dtype(kind))
    rows = input.reshape(-1, linear.in_features)
    if has_no_rows(linear, rows):
        return linear_without_rows(linear, input)
    number = rows.shape[0]
    padded = F.pad(rows, (0, 0, 0, -number % multiple)).contiguous()
    output = gemm(padded, linear.weight.to(input.dtype))[:number]
    output = output.reshape(*input.shape[:-1], linear.out_features)
    return output if linear.bias is None else output + linear.bias.to(output.dtype)
