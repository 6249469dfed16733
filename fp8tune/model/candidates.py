"""What is looked at in the user's model: layers to be timed, and what they were seen with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fp8tune.decision.reasons import Reason
    from fp8tune.decision.records import Signature

__all__ = ["Candidate", "LeftOut", "Sample"]


@dataclass(frozen=True)
class Candidate:
    """A Linear, or a grouped GEMM, that is converted during warmup and timed.

    Attributes:
        fqn: its fully qualified name, without the prefixes that wrappers add.
        linear: the layer.
        excluded: (recipe, reason) of the recipes that do not take this layer.
    """

    fqn: str
    linear: nn.Linear
    excluded: tuple[tuple[str, Reason], ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A layer that stays in high precision from the start, and why."""

    fqn: str
    linear: nn.Linear
    reason: Reason


@dataclass(frozen=True)
class Sample:
    """One signature and the tensors it was seen with.

    A tensor that did not fit into ``capture_bytes`` is None, and is replaced by random
    numbers of the same shape and dtype when the signature is timed. Where the weight is
    None, the layer's own is used as it is by then.

    Attributes:
        device: where it was called; None is where its input is, or its weight.
        finite: False where every input, or every gradient, of training held inf or NaN.
        routings: of a grouped GEMM, where the rows of each expert ended in several calls,
            each of shape (E,); that of the tensors first, none if nobody saw one.
    """

    signature: Signature
    linear: nn.Linear
    input: torch.Tensor | None
    grad_output: torch.Tensor | None
    weight: torch.Tensor | None = None
    device: torch.device | None = None
    finite: bool = True
    routings: tuple[torch.Tensor, ...] = ()
