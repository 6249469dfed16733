"""The input, the weight and the gradient of calls, kept together for timing."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import torch

from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.called import of_weight
from fp8tune.model.candidates import Sample
from fp8tune.model.kept import Budget, Kept, LastCopy
from fp8tune.model.sharding import to_local
from fp8tune.model.transforms import is_wrapped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from fp8tune.decision.records import Shape, Signature

__all__ = ["KeptTensors"]

logger = logging.getLogger("fp8tune")

# Besides that of the tensors: the last ones, since routing changes while it is learned.
_MORE_ROUTINGS = 3


class KeptTensors:
    """Detached copies of what training calls layers with.

    Args:
        budget_bytes: bytes that may be kept in all, see ``fp8tune.model.kept``.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = Budget(budget_bytes)
        self._copies = LastCopy()
        self._inputs = Kept(self._budget)
        self._grads = Kept(self._budget)
        self._weights = Kept(self._budget)
        self._offs: dict[Shape, torch.Tensor] = {}
        self._last_offs: dict[Shape, deque[torch.Tensor]] = {}

    def keep_input(
        self, shape: Shape, tensor: torch.Tensor, offs: torch.Tensor | None = None
    ) -> None:
        """Keep the input of a call, shape (..., K), and where each expert's rows end."""
        kept = self._keep(self._inputs, shape, tensor, offs)
        # Not those of a dry run. They are small, so that the budget does not matter.
        if type(offs) is torch.Tensor:
            copy = offs.detach().clone()
            if kept or shape not in self._offs:
                self._offs[shape] = copy
            last = self._last_offs.setdefault(shape, deque(maxlen=_MORE_ROUTINGS))
            last.append(copy)

    def keep_grad(self, shape: Shape, tensor: torch.Tensor) -> None:
        """Keep the gradient of its output, shape (..., N)."""
        self._keep(self._grads, shape, tensor, self._offs.get(shape))

    def keep_weight(self, shape: Shape, tensor: torch.Tensor) -> None:
        """Keep the weight as it is now, shape (N, K)."""
        self._keep(self._weights, of_weight(shape), tensor)

    def sample(
        self, signature: Signature, linear: nn.Linear, device: torch.device
    ) -> Sample:
        """A signature with the tensors that were kept for its shape, or rows of them."""
        shape = signature.shape
        return Sample(
            signature,
            linear,
            self._inputs.get(shape),
            self._grads.get(shape),
            self._weights.get(of_weight(shape)),
            device,
            finite=self._inputs.is_finite(shape) and self._grads.is_finite(shape),
            routings=tuple(self._routings(shape)),
        )

    def _routings(self, shape: Shape) -> Iterator[torch.Tensor]:
        """Those that differ, that of the kept tensors first."""
        own = self._offs.get(shape)
        several = [] if own is None else [own, *self._last_offs[shape]]
        for i, offs in enumerate(several):
            if not any(torch.equal(offs, x) for x in several[:i]):
                yield offs

    def release(self) -> None:
        """Let go of the tensors and keep no more of them."""
        self._budget.bytes = 0
        self._copies.forget()
        for kept in (self._inputs, self._grads, self._weights):
            kept.clear()

    def _keep(
        self,
        kept: Kept,
        shape: Shape,
        tensor: torch.Tensor,
        offs: torch.Tensor | None = None,
    ) -> bool:
        """Whether this very tensor was kept."""
        if is_wrapped(tensor):  # it would be dead when it is timed
            return False
        local = to_local(tensor)
        kept.drop_if_not_finite(shape)  # as of a loss scale that overflowed
        if not kept.make_room(shape, local.nbytes):
            return False
        try:
            # A copy, since the model may change the tensor in place afterwards.
            copy = self._copies.of(tensor)
            if copy is None:
                copy = _without_tail(local.clone(), offs)
                self._copies.remember(tensor, copy)
            kept.put(shape, copy)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.info("no memory to keep tensors for timing; using random numbers")
            self.release()
            return False
        return True


def _without_tail(copy: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """Zeros where no expert's rows are, which hold whatever was there before."""
    if offs is not None:
        numbers = torch.arange(len(copy), device=copy.device)
        copy.masked_fill_((numbers >= offs[-1]).unsqueeze(-1), 0)
    return copy
