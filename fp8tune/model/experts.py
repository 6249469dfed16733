"""The grouped GEMMs of mixture-of-experts models, each handled like a Linear.

A module of experts holds one 3-D Parameter for all of them, and multiplies the rows of
each expert with its matrix in one grouped GEMM. ``GroupedLinear`` stands for one such
GEMM, so that all that is done with Linears is done with it by the same path; the module,
its Parameters and their names stay as they are. Who holds such a Parameter is only a
potential candidate: whether it calls a grouped GEMM shows in training, by
``fp8tune.model.rerouting``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Call = Callable[..., torch.Tensor]

__all__ = [
    "GroupedLinear",
    "experts_in",
    "experts_of",
    "home_of",
    "is_transposed",
    "plain_class",
    "stand_in",
    "where_kept",
]

# Where a module keeps those of its grouped GEMMs that are rerouted right now.
where_kept = "_rerouted_gemms"

# Dimensions of a Parameter that holds one matrix for each expert.
_STACKED = 3


class GroupedLinear(nn.Linear):
    """One grouped GEMM of a module of experts.

    It has no Parameters: the weight is the owner's, as it is by then, such as gathered by
    FSDP2. What calls it gives the operands.

    Args:
        owner: the module of experts.
        parameter: name of its Parameter, shape (E, N, K), or (E, K, N) if the owner says
            ``is_transposed``, as those of Transformers do.

    Attributes:
        holds: for what it is rerouted right now; see ``fp8tune.model.rerouting``.
    """

    bias: None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        nn.Module.__init__(self)
        # Not by attribute assignment, which would make the owner a child.
        vars(self).update(owner=owner, parameter=parameter, holds=set())

    owner: nn.Module
    parameter: str
    holds: set[str]

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The owner's Parameter, shape (E, N, K) or (E, K, N)."""
        return cast("nn.Parameter", getattr(self.owner, self.parameter))

    @property
    def experts(self) -> int:
        """How many there are on all ranks."""
        return self.weight.shape[0]

    # Only a call tells which of its sizes is K. What follows is as the owner says it, so
    # that a layer that was not called yet can be named; verdicts have what calls had.

    @property
    def transposed(self) -> bool:
        """Whether the owner says that its matrices are (K, N)."""
        return getattr(self.owner, "is_transposed", False) is True

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """K."""
        return self.weight.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """N."""
        return self.weight.shape[2 if self.transposed else 1]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        offs: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """The grouped GEMM as the owner calls it.

        Args:
            input: shape (T, K), the rows of the first expert first.
            weight: shape (E, K, N), whatever lies behind it in memory.
            offs: shape (E,), where the rows of each expert end.
            call: the owner's function.

        Returns:
            Shape (T, N); what is behind the last expert's rows is undefined.
        """
        return call(input, weight, offs)

    def extra_repr(self) -> str:
        """Its sizes."""
        sizes = f"experts={self.experts}, in_features={self.in_features}"
        return f"{sizes}, out_features={self.out_features}"


def is_transposed(weight: torch.Tensor) -> bool:
    """Whether matrices of shape (E, K, N) lie in memory as such, not as (E, N, K)."""
    return weight.stride(-1) == 1 and weight.stride(-2) != 1


def home_of(linear: nn.Linear) -> nn.Module:
    """The module of the user's that a candidate is: itself, or the module of experts."""
    return linear.owner if isinstance(linear, GroupedLinear) else linear


def plain_class(linear: nn.Linear) -> type[nn.Linear]:
    """What a candidate is an instance of while it is not converted."""
    return GroupedLinear if isinstance(linear, GroupedLinear) else nn.Linear


def experts_in(linear: nn.Linear) -> int:
    """How many experts a candidate has; 0 for a Linear."""
    return linear.experts if isinstance(linear, GroupedLinear) else 0


def experts_of(module: nn.Module) -> Iterator[tuple[str, GroupedLinear]]:
    """A handle for each 3-D Parameter that may be one of experts, by its name.

    Those that are rerouted have one for as long as they are. Parameters of torch's own
    modules, as of a convolution, are none; nor is a lone matrix, such as embeddings of
    positions, (1, S, D).
    """
    if any(
        x.__module__.startswith("torch.nn.") and x is not nn.Module
        for x in type(module).__mro__
    ):
        return
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    stacks = {k: x for k, x in own.items() if _holds_matrices(x)}
    if len(stacks) == 1 and next(iter(stacks.values())).shape[0] == 1:
        return
    rerouted = vars(module).get(where_kept, {})
    for name in stacks:
        yield name, rerouted.get(name) or GroupedLinear(module, name)


def _holds_matrices(tensor: torch.Tensor) -> bool:
    return tensor.dim() == _STACKED and min(tensor.shape[1:]) > 1


class _Experts(nn.Module):
    """The least module of experts: one Parameter, one grouped GEMM."""

    def __init__(
        self, weight: nn.Parameter, offs: torch.Tensor | None, transposed: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None
        self.is_transposed = transposed
        # No buffer, which a compiler might take for a constant that changes.
        self.offs = offs

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (T, K) -> (T, N)."""
        weight = self.weight if self.is_transposed else self.weight.transpose(-2, -1)
        return F.grouped_mm(input, weight, offs=self.offs)


def stand_in(
    weight: nn.Parameter, offs: torch.Tensor | None = None, *, transposed: bool
) -> GroupedLinear:
    """A grouped GEMM of no model; its ``owner`` can be called with an input.

    Args:
        weight: shape (E, N, K), or (E, K, N) if transposed.
        offs: shape (E,), where the rows of each expert end; None where it is not called.
        transposed: see ``weight``.
    """
    return GroupedLinear(_Experts(weight, offs, transposed), "weight")
