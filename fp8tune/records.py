"""The records that flow from stage to stage. All frozen; none computes anything.

::

    screen   -> Candidate | LeftOut      a Linear to be timed, or why it is not
    capture  -> Signature, Layer, Sample what was called, how often, and with what
    measure  -> Measurement              raw times of one signature, both variants
    decide   -> Decision                 float8 or reference, and why

M is the number of rows of the GEMM (the product of the input's leading dimensions on
this rank), K is ``in_features`` and N is ``out_features``. Times are milliseconds.
Dtypes are names such as "bfloat16", so that a record can be written to JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from fp8tune.intervals import is_steady

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "REFERENCE",
    "Candidate",
    "Decision",
    "Layer",
    "LeftOut",
    "Measurement",
    "Reason",
    "Sample",
    "Shape",
    "Signature",
    "Verdict",
]

# The name of the high-precision variant, beside which recipes have their own names.
REFERENCE = "reference"


class Verdict(StrEnum):
    """What a layer ends as."""

    FLOAT8 = "float8"
    REFERENCE = "reference"


class Reason(StrEnum):
    """Why a layer ended as it did; ``sentence`` says it in words."""

    FASTER = "faster"
    SLOWER = "slower"
    NO_CLEAR_DIFFERENCE = "no_clear_difference"
    FILTERED_BY_NAME = "filtered_by_name"
    NOT_DIVISIBLE_BY_16 = "not_divisible_by_16"
    SMALL_KN = "small_kn"
    NOT_PLAIN_LINEAR = "not_plain_linear"
    ALREADY_FLOAT8 = "already_float8"
    PARAMETRIZED = "parametrized"
    TIED_TO_EMBEDDING = "tied_to_embedding"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    NEVER_CALLED = "never_called"
    OUT_OF_MEMORY = "out_of_memory"
    NOT_MEASURED = "not_measured"

    @property
    def sentence(self) -> str:
        """The reason as a sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.FASTER: "its speedup lies clearly above the threshold",
    Reason.SLOWER: "its speedup lies clearly below the threshold",
    Reason.NO_CLEAR_DIFFERENCE: "the interval of its speedup holds the threshold",
    Reason.FILTERED_BY_NAME: "its name contains one of filter_fqns",
    Reason.NOT_DIVISIBLE_BY_16: "K or N is no multiple of 16, which float8 GEMMs need",
    Reason.SMALL_KN: "K or N is below the recipe's static threshold",
    Reason.NOT_PLAIN_LINEAR: "it is a subclass of nn.Linear, which may differ in forward",
    Reason.ALREADY_FLOAT8: "it was converted before",
    Reason.PARAMETRIZED: "its weight is computed by a parametrization or a hook",
    Reason.TIED_TO_EMBEDDING: "it is an output layer that shares an embedding's weight",
    Reason.UNSUPPORTED_DTYPE: "the recipe does not take weights of this dtype",
    Reason.NEVER_CALLED: "no training step called it",
    Reason.OUT_OF_MEMORY: "memory ran out while it was timed",
    Reason.NOT_MEASURED: "it could not be timed",
}


@dataclass(frozen=True)
class Candidate:
    """A Linear that is converted during warmup and timed."""

    fqn: str
    linear: nn.Linear


@dataclass(frozen=True)
class LeftOut:
    """A Linear that stays in high precision from the start, and why."""

    fqn: str
    linear: nn.Linear
    reason: Reason


@dataclass(frozen=True, order=True)
class Shape:
    """What one call of a Linear looks like before its gradients are known."""

    m: int
    k: int
    n: int
    input_dtype: str
    weight_dtype: str
    autocast_dtype: str | None
    bias: bool


@dataclass(frozen=True, order=True)
class Signature:
    """What is timed: calls with equal signatures cost the same and are timed once.

    Attributes:
        shape: M, K, N, dtypes and bias of the call.
        grad_input: backward computes the gradient of the input.
        grad_weight: backward computes the gradient of the weight.
        grad_bias: backward computes the gradient of the bias.
        recompute: forward runs twice, since activation checkpointing repeats it.
    """

    shape: Shape
    grad_input: bool
    grad_weight: bool
    grad_bias: bool
    recompute: bool = False


@dataclass(frozen=True)
class Layer:
    """One Linear of the model and how training used it.

    Attributes:
        fqn: its fully qualified name, without the prefixes that wrappers add.
        k: in_features of the local weight.
        n: out_features of the local weight.
        weight_dtype: name of the weight's dtype.
        trains: whether the weight takes a gradient.
        reason: why it was left out, or None for a candidate.
        calls: (signature, number of calls) over all warmup steps, sorted.
    """

    fqn: str
    k: int
    n: int
    weight_dtype: str
    trains: bool
    reason: Reason | None
    calls: tuple[tuple[Signature, int], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One signature and the tensors it was seen with.

    A tensor that did not fit into ``capture_bytes`` is None, and is replaced by random
    numbers of the same shape and dtype when the signature is timed. The weight is kept
    only where the layer does not hold it between steps, as under FSDP2.
    """

    signature: Signature
    linear: nn.Linear
    input: torch.Tensor | None
    grad_output: torch.Tensor | None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class Measurement:
    """Raw times of one signature; pair i is reference_ms[i] and candidate_ms[i].

    Attributes:
        signature: what was timed.
        recipe: name of the candidate's recipe.
        reference_ms: forward + backward in high precision, in milliseconds.
        candidate_ms: forward + backward with the recipe, in milliseconds.
        failure: why there are no times, or None.
        detail: the failure in the words of whoever raised it.
        synthetic: random numbers stood in for tensors that were not captured.
        recorded: the day it was timed, in UTC, as "2026-01-31"; "" if nobody said.
    """

    signature: Signature
    recipe: str
    reference_ms: tuple[float, ...] = ()
    candidate_ms: tuple[float, ...] = ()
    failure: Reason | None = None
    detail: str = ""
    synthetic: bool = False
    recorded: str = ""

    @property
    def steady(self) -> bool:
        """Whether the machine was free while this was timed."""
        columns = (self.reference_ms, self.candidate_ms)
        return all(is_steady(column) for column in columns if column)

    @property
    def ratios(self) -> list[float]:
        """Speedup of each pair: reference time / candidate time."""
        pairs = zip(self.reference_ms, self.candidate_ms, strict=True)
        return [reference / candidate for reference, candidate in pairs]


@dataclass(frozen=True)
class Decision:
    """What became of one Linear, and why.

    Times are those of one call, forward + backward, in milliseconds; where a layer was
    called with several signatures they are the mean over its calls. Speedup is reference
    time / float8 time. Layers that were not timed have None there, and so has the upper
    bound of a speedup that too few samples could not bound.
    """

    fqn: str
    k: int
    n: int
    verdict: Verdict
    reason: Reason
    recipe: str | None = None
    signatures: tuple[tuple[Signature, int], ...] = ()
    reference_ms: float | None = None
    float8_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    samples: int = 0
    detail: str = ""
