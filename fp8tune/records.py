"""The records that flow from stage to stage. All frozen; none computes anything.

::

    screen   -> Candidate | LeftOut      a Linear to be timed, or why it is not
    capture  -> Signature, Layer, Sample what was called, how often, and with what
    measure  -> Measurement              raw times of one signature and one recipe
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
from fp8tune.reasons import Reason

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "REFERENCE",
    "Accuracy",
    "Candidate",
    "Decision",
    "Layer",
    "LeftOut",
    "Measurement",
    "Reason",
    "Sample",
    "Shape",
    "Signature",
    "Variant",
    "Verdict",
]

# The name of the high-precision variant, beside which recipes have their own names.
REFERENCE = "reference"


class Verdict(StrEnum):
    """What a layer ends as."""

    FLOAT8 = "float8"
    REFERENCE = "reference"


@dataclass(frozen=True)
class Candidate:
    """A Linear that is converted during warmup and timed.

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
        excluded: (recipe, reason) of the recipes that do not take a candidate.
    """

    fqn: str
    k: int
    n: int
    weight_dtype: str
    trains: bool
    reason: Reason | None
    calls: tuple[tuple[Signature, int], ...] = ()
    excluded: tuple[tuple[str, Reason], ...] = ()


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
class Accuracy:
    """What a recipe costs in accuracy on the tensors of one signature.

    SQNR is 10 * log10(sum(exact**2) / sum((result - exact)**2)), in dB, where exact is
    float32; it is kept within -200 and 200. None is a result that is not computed.

    Attributes:
        output_db: of the output.
        grad_input_db: of the gradient of the input.
        grad_weight_db: of the gradient of the weight.
        underflow: share of the nonzero values of all GEMM operands that become zero
            when they are cast; None if the recipe does not say what it casts.
        saturation: share of them that lie beyond the largest value of the dtype.
    """

    output_db: float | None = None
    grad_input_db: float | None = None
    grad_weight_db: float | None = None
    underflow: float | None = None
    saturation: float | None = None

    @property
    def worst_db(self) -> float | None:
        """The lowest of the three."""
        every = (self.output_db, self.grad_input_db, self.grad_weight_db)
        return min((x for x in every if x is not None), default=None)


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
        accuracy: of the candidate's results, or None if nothing was computed.
        reference_bytes: most memory that the reference allocated at a time, or None
            where that cannot be told, as on a CPU.
        candidate_bytes: the same for the candidate.
        warm_up_s: seconds until all variants that were timed together were warm:
            compiling, autotuning, first calls.
    """

    signature: Signature
    recipe: str
    reference_ms: tuple[float, ...] = ()
    candidate_ms: tuple[float, ...] = ()
    failure: Reason | None = None
    detail: str = ""
    synthetic: bool = False
    recorded: str = ""
    accuracy: Accuracy | None = None
    reference_bytes: int | None = None
    candidate_bytes: int | None = None
    warm_up_s: float = 0.0

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
class Variant:
    """One recipe for one Linear: its numbers, and why it was taken or not.

    The fields are those of ``Decision``. Over several signatures accuracy is that of the
    worst, and memory that of the largest.

    Attributes:
        recipe: its name.
        reason: why it was taken or not.
        sqnr_db: the lowest SQNR of output and gradients, in dB.
        underflow: largest share of values that were flushed to zero.
        saturation: largest share of values beyond the dtype's range.
        reference_bytes: peak memory of the high-precision variant.
        float8_bytes: peak memory of this one.
    """

    recipe: str
    reason: Reason
    reference_ms: float | None = None
    float8_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    samples: int = 0
    sqnr_db: float | None = None
    underflow: float | None = None
    saturation: float | None = None
    reference_bytes: int | None = None
    float8_bytes: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Decision:
    """What became of one Linear, and why.

    Times are those of one call, forward + backward, in milliseconds; where a layer was
    called with several signatures they are the mean over its calls. Speedup is reference
    time / float8 time. Layers that were not timed have None there, and so has the upper
    bound of a speedup that too few samples could not bound.

    ``variants`` has one record for each recipe, in the order in which they were given,
    and the numbers here are those of the recipe ``nearest``: the one that was chosen, or
    the one that came nearest to it.
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
    sqnr_db: float | None = None
    reference_bytes: int | None = None
    float8_bytes: int | None = None
    nearest: str | None = None
    variants: tuple[Variant, ...] = ()
