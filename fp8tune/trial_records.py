"""What trials of whole plans measured, as it is kept in plans and caches."""

from dataclasses import dataclass

__all__ = ["TrialRecord", "TrialResult"]


@dataclass(frozen=True)
class TrialResult:
    """What one trial plan measured.

    Attributes:
        converted: names of the roles that it converts, sorted.
        layers: how many layers that is.
        step_ms: median time of a training step, forward + backward, in milliseconds.
        speedup: step time of all-reference / its own, with its interval.
        speedup_low: see above.
        speedup_high: see above; None where too few rounds could not bound it.
        rounds: counted rounds.
        peak_bytes: most memory that a step of it had allocated; None on a CPU.
    """

    converted: tuple[str, ...]
    layers: int
    step_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float | None
    rounds: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class TrialRecord:
    """How a trial ended.

    Attributes:
        converted: the layers that the winner converts.
        unclear: those that it does not convert, though some plan that does was not
            clearly slower.
        results: of all plans.
    """

    converted: tuple[str, ...]
    unclear: tuple[str, ...]
    results: tuple[TrialResult, ...]
