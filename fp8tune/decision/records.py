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

# The codec reads the types of the fields while it runs.
from fp8tune.decision.accuracy import Accuracy  # noqa: TC001
from fp8tune.decision.intervals import is_steady
from fp8tune.decision.load import Load  # noqa: TC001
from fp8tune.decision.reasons import Reason  # noqa: TC001

__all__ = [
    "REFERENCE",
    "Decision",
    "Layer",
    "Measurement",
    "Shape",
    "Signature",
    "Variant",
    "Verdict",
]

# The name of the high-precision variant, beside which recipes have their own names.
REFERENCE = "reference"


class Verdict(StrEnum):
    """What a layer ends as."""

    CONVERTED = "converted"
    REFERENCE = "reference"


@dataclass(frozen=True, order=True)
class Shape:
    """What one call of a Linear looks like before its gradients are known.

    Attributes:
        experts: how many matrices a grouped GEMM multiplies, on this rank; 0 for a Linear.
            M are the rows of all of them together.
        transposed: they lie in memory as (K, N), not as (N, K), which a Linear's does.
    """

    m: int
    k: int
    n: int
    input_dtype: str
    weight_dtype: str
    autocast_dtype: str | None
    bias: bool
    experts: int = 0
    transposed: bool = False


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
    """One Linear or grouped GEMM of the model and how training used it.

    Attributes:
        fqn: its fully qualified name, without the prefixes that wrappers add.
        k: in_features of the whole layer; calls have the part on this rank.
        n: out_features of the whole layer.
        weight_dtype: name of the weight's dtype.
        trains: whether the weight takes a gradient.
        reason: why it was left out, or None for a candidate.
        calls: (signature, number of calls) over all warmup steps, sorted.
        excluded: (recipe, reason) of the recipes that do not take a candidate.
        experts: how many matrices a grouped GEMM multiplies, on all ranks; 0 for a Linear.
            Its k and n may be exchanged where nobody says which dimension is which.
    """

    fqn: str
    k: int
    n: int
    weight_dtype: str
    trains: bool
    reason: Reason | None
    calls: tuple[tuple[Signature, int], ...] = ()
    excluded: tuple[tuple[str, Reason], ...] = ()
    experts: int = 0


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
        load: how busy the machine was meanwhile, or None where the clock does not tell.
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
    load: Load | None = None

    @property
    def steady(self) -> bool:
        """Whether the machine was free while this was timed."""
        columns = (self.reference_ms, self.candidate_ms)
        undisturbed = self.load is None or self.load.steady
        return undisturbed and all(is_steady(column) for column in columns if column)

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
        candidate_bytes: peak memory of this one.
    """

    recipe: str
    reason: Reason
    reference_ms: float | None = None
    candidate_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    samples: int = 0
    sqnr_db: float | None = None
    underflow: float | None = None
    saturation: float | None = None
    reference_bytes: int | None = None
    candidate_bytes: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Decision:
    """What became of one Linear or grouped GEMM, and why.

    Times are those of one call, forward + backward, in milliseconds; where a layer was
    called with several signatures they are the mean over its calls. Speedup is reference
    time / float8 time. Layers that were not timed have None there, and so has the upper
    bound of a speedup that too few samples could not bound.

    Layers that met many M are judged together with their like (see
    ``fp8tune.decision.pooling``); ``signatures`` then has the calls of all of them, and
    ``shared_by`` says how many they are. ``timed_m`` are the M that were timed, from
    which the others are interpolated.

    ``variants`` has one record for each recipe, in the order in which they were given,
    and the numbers here are those of the recipe ``nearest``: the one that was chosen, or
    the one that came nearest to it.

    ``experts`` is how many matrices a grouped GEMM of experts multiplies, on all ranks; it
    is 0 for a Linear.
    """

    fqn: str
    k: int
    n: int
    verdict: Verdict
    reason: Reason
    recipe: str | None = None
    signatures: tuple[tuple[Signature, int], ...] = ()
    reference_ms: float | None = None
    candidate_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    samples: int = 0
    detail: str = ""
    sqnr_db: float | None = None
    reference_bytes: int | None = None
    candidate_bytes: int | None = None
    nearest: str | None = None
    variants: tuple[Variant, ...] = ()
    timed_m: tuple[int, ...] = ()
    shared_by: int = 1
    experts: int = 0
