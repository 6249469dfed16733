"""The tensors that a signature is timed with, the same for all of its variants."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fp8tune.model.sharding import to_local
from fp8tune.timing.synthetic import (
    even_routing,
    random_activations,
    random_weight,
    weight_shape,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.model.candidates import Sample

__all__ = ["Operands"]


class Operands:
    """The tensors of a sample, with random numbers for those that were not captured.

    Built at first use, so that a scripted clock never allocates.
    """

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        seen = sample.linear.weight if sample.input is None else sample.input
        self.device = sample.device or seen.device
        self._grad_output: torch.Tensor | None = None

    @cached_property
    def _generator(self) -> torch.Generator:
        # Of its own, since the user's seed must not move.
        return torch.Generator(self.device).manual_seed(0)

    @cached_property
    def input(self) -> torch.Tensor:
        """Shape (*, K); requires grad if it did in training."""
        signature = self.sample.signature
        tensor = self.sample.input
        if tensor is None:
            tensor = random_activations(signature.shape, self._generator)
        # Rows of a larger call may have been kept on another device.
        return tensor.detach().to(self.device).requires_grad_(signature.grad_input)

    def grad_output(self, output: torch.Tensor) -> torch.Tensor:
        """The captured gradient, or random numbers, like ``output`` in shape and dtype."""
        kept = self._grad_output
        if kept is None or kept.dtype != output.dtype:
            captured = self.sample.grad_output
            if captured is None or captured.numel() != output.numel():
                kept = self._random(output.shape, output.dtype)
            else:
                kept = captured.reshape(output.shape).to(output)
            self._grad_output = kept
        return kept

    def shrink_grad(self, factor: float) -> None:
        """From now on use a smaller gradient, as after a loss scale that overflowed."""
        if self._grad_output is not None:
            self._grad_output = self._grad_output * factor

    @cached_property
    def weight(self) -> torch.Tensor:
        """The layer's own, or a copy of what it was gathered to; see ``weight_shape``."""
        shape = self.sample.signature.shape
        own = to_local(self.sample.linear.weight)
        tensor = own if self.sample.weight is None else self.sample.weight
        dtype = getattr(torch, shape.weight_dtype)
        # The owner of experts may cast them before each call.
        fits = shape.experts > 0 or tensor.dtype == dtype
        if tensor.shape == weight_shape(shape) and fits:
            # It is elsewhere where it is offloaded.
            return tensor.to(self.device, dtype)
        return random_weight(shape, self._generator)

    @cached_property
    def routings(self) -> list[torch.Tensor]:
        """Where the rows of each expert end, each of shape (E,); of a Linear none.

        As seen in training, that of the tensors first.
        """
        seen, shape = self.sample.routings, self.sample.signature.shape
        if shape.experts and not seen:
            return [even_routing(shape, self.device)]
        return [x.to(self.device) for x in seen]

    @property
    def offs(self) -> torch.Tensor:
        """The routing of the tensors."""
        return self.routings[0]

    @cached_property
    def bias(self) -> torch.Tensor:
        """Shape (N,); zeros, whose addition takes as long as any other."""
        dtype = self.weight.dtype
        return torch.zeros(self.weight.shape[0], dtype=dtype, device=self.device)

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(
            shape, generator=self._generator, device=self.device, dtype=dtype
        )
