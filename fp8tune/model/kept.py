"""Tensors of the user's calls that are kept for timing, within a budget of bytes.

M may be another in every step, so not every M keeps a tensor: at most four of a kind do,
and a larger one takes the place of the smallest. A call with fewer rows than one that was
kept is timed on its first rows; these are real numbers too. So whichever M are chosen
in the end, only those above the largest that fitted need random numbers.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from fp8tune.decision.kinds import MOST_TIMED
from fp8tune.model.allocation import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from fp8tune.decision.records import Shape

__all__ = ["Budget", "Kept", "LastCopy"]


@dataclass
class Budget:
    """Bytes that may still be kept, shared by several ``Kept``."""

    bytes: int


class Kept:
    """Copies of one tensor of each call, such as its input, by shape.

    Args:
        budget: is drawn on.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._finite: set[Shape] = set()
        self._not_finite: set[Shape] = set()
        self._by_m: dict[Shape, dict[int, torch.Tensor]] = {}

    def make_room(self, shape: Shape, nbytes: int) -> bool:
        """Whether a tensor of that shape is worth keeping; then there is room for it."""
        known = self._by_m.get(_any_m(shape), {})
        if shape.m in known:
            return False
        smaller = sorted(m for m in known if m < shape.m)
        full = len(known) >= MOST_TIMED
        # It can stand in for the smaller ones, which make room for it.
        spare = self._budget.bytes + sum(known[m].nbytes for m in smaller)
        if nbytes > spare or (full and not smaller):
            return False
        if full:
            self._let_go_of(known, smaller.pop(0))
        while nbytes > self._budget.bytes:
            self._let_go_of(known, smaller.pop(0))
        return True

    def drop_if_not_finite(self, shape: Shape) -> None:
        """Make place for the next call's tensor, where a kept one holds inf or NaN."""
        known = self._by_m.get(_any_m(shape), {})
        if shape.m in known and (shape not in self._finite):
            if _is_finite(known[shape.m]):
                self._finite.add(shape)
                self._not_finite.discard(shape)
            else:
                self._not_finite.add(shape)
                self._let_go_of(known, shape.m)

    def is_finite(self, shape: Shape) -> bool:
        """Whether what ``get`` returns is not missing for want of finite numbers."""
        return shape not in self._not_finite or self.get(shape) is not None

    def _let_go_of(self, known: dict[int, torch.Tensor], m: int) -> None:
        self._budget.bytes += known.pop(m).nbytes

    def put(self, shape: Shape, tensor: torch.Tensor) -> None:
        """Keep a copy that the caller made, after ``make_room`` said so."""
        self._by_m.setdefault(_any_m(shape), {})[shape.m] = tensor
        self._budget.bytes -= tensor.nbytes

    def get(self, shape: Shape) -> torch.Tensor | None:
        """What was kept for a call of that shape: its own, or rows of a larger one.

        Returns:
            a tensor whose last dimension is that of the call, or None.
        """
        known = self._by_m.get(_any_m(shape), {})
        self.drop_if_not_finite(shape)
        if shape.m in known:
            return known[shape.m]
        for larger in sorted(m for m in known if m > shape.m):
            self.drop_if_not_finite(replace(shape, m=larger))
            if larger in known:
                return known[larger].flatten(0, -2)[: shape.m]
        return None

    def clear(self) -> None:
        """Let go of all."""
        self._by_m.clear()


class LastCopy:
    """The last tensor that was copied, since wq, wk and wv are called with one input."""

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._version = 0
        self._copy: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Its copy, if it was copied last and has not changed since."""
        known = self._source is not None and self._source() is tensor
        return self._copy if known and tensor._version == self._version else None  # noqa: SLF001

    def remember(self, tensor: torch.Tensor, copy: torch.Tensor) -> None:
        """Note a copy."""
        # A Parameter that has a weak reference cannot be moved by .to(), and a tensor of
        # inference mode does not say when it changes.
        if isinstance(tensor, nn.Parameter) or tensor.is_inference():
            self.forget()
        else:
            self._source, self._copy = weakref.ref(tensor), copy
            self._version = tensor._version  # noqa: SLF001

    def forget(self) -> None:
        """Let go of the copy."""
        self._source = self._copy = None


def _any_m(shape: Shape) -> Shape:
    return replace(shape, m=0)


def _is_finite(tensor: torch.Tensor) -> bool:
    try:
        return bool(tensor.isfinite().all())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return True  # not known, and timed all the same
