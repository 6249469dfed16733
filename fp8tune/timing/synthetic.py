"""Random numbers like those of training, for tensors that nobody captured.

Their distribution hardly moves a time, but it does move an SQNR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fp8tune.decision.records import Shape

__all__ = ["random_activations", "random_weight"]

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
    """Shape (N, K): uniform within 1 / sqrt(K), as nn.Linear is initialised."""
    weight = torch.empty(
        (shape.n, shape.k),
        device=generator.device,
        dtype=getattr(torch, shape.weight_dtype),
    )
    bound = shape.k**-0.5
    return weight.uniform_(-bound, bound, generator=generator)
