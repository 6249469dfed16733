"""What a model is called with, from examples or from their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fp8tune.errors import ConfigError
from fp8tune.model.linears import named_linears

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["example_inputs"]


def example_inputs(
    batch: Any, module: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of the model's forward.

    Args:
        batch: one argument, a sequence of them, or a mapping of them by name. A tuple of
            whole numbers in the place of a tensor is its shape: of token ids if the model
            has an nn.Embedding, else of activations in the dtype of its first Linear.
        module: the model.

    Returns:
        (arguments, arguments by name); what shapes stood for is on the meta device.

    Raises:
        ConfigError: there is neither a tensor nor a shape in it.
    """

    def tensor(value: Any) -> Any:
        return _example(value, module) if _is_shape(value) else value

    if isinstance(batch, Mapping):
        found: Any = ((), {str(k): tensor(v) for k, v in batch.items()})
    elif isinstance(batch, list | tuple) and not _is_shape(batch):
        found = (tuple(map(tensor, batch)), {})
    else:
        found = ((tensor(batch),), {})
    values = (*found[0], *found[1].values())
    if not any(isinstance(x, torch.Tensor) for x in values):
        raise ConfigError(
            f"batch is {batch!r}; it must be what the model is called with: a tensor or "
            "its shape such as (2, 8192), a sequence of those, or a dict of them by name"
        )
    return found


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) > 0
        and all(type(x) is int and x > 0 for x in value)
    )


def _example(shape: Sequence[int], module: nn.Module) -> torch.Tensor:
    has_tokens = any(isinstance(x, nn.Embedding) for x in module.modules())
    first = next((linear for _, linear in named_linears(module)), None)
    dtype = torch.long if has_tokens or first is None else first.weight.dtype
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
