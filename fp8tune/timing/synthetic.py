"""Random numbers like those of training, for tensors that nobody captured.

Their distribution hardly moves a time, but it does move an SQNR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fp8tune.decision.records import Shape

__all__ = ["even_routing", "random_activations", "random_weight", "weight_shape"]

# Transformers have a few channels of large values, "up to 20 times larger" than the
# others, in about 0.1% of the features: LLM.int8(), https://arxiv.org/abs/2208.07339.
_OUTLIER_SCALE = 20.0
_CHANNELS_PER_OUTLIER = 1000


def random_activations(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Shape (M, K): standard normal, with a few outlier channels, at least one."""
    tensor = torch.randn(
        (shape.m, shape.k),
        generator=generator,
        device=generator.device,
        dtype=getattr(torch, shape.input_dtype),
    )
    number = max(1, shape.k // _CHANNELS_PER_OUTLIER)
    channels = torch.randperm(shape.k, generator=generator, device=generator.device)[
        :number
    ]
    tensor[:, channels] *= _OUTLIER_SCALE
    return tensor


def random_weight(shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Shape ``weight_shape``: uniform within 1 / sqrt(K), as nn.Linear is initialised."""
    weight = torch.empty(
        weight_shape(shape),
        device=generator.device,
        dtype=getattr(torch, shape.weight_dtype),
    )
    bound = shape.k**-0.5
    return weight.uniform_(-bound, bound, generator=generator)


def weight_shape(shape: Shape) -> tuple[int, ...]:
    """That of the Parameter: (N, K), of experts (E, N, K), or (E, K, N) if transposed."""
    matrix = (shape.k, shape.n) if shape.transposed else (shape.n, shape.k)
    return (shape.experts, *matrix) if shape.experts else matrix


def even_routing(shape: Shape, device: torch.device) -> torch.Tensor:
    """Shape (E,): where each expert's rows end if all have the same number."""
    ends = [shape.m * (i + 1) // shape.experts for i in range(shape.experts)]
    return torch.tensor(ends, dtype=torch.int32, device=device)
