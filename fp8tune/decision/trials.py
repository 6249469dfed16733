"""What trials of whole plans measured, as it is kept in plans and caches."""

from dataclasses import dataclass

__all__ = [
    "GATHER",
    "MOST_STEPS",
    "NONE_NEEDED",
    "RoleGain",
    "TrialRecord",
    "TrialResult",
    "TrialSteps",
]

# The one role that is no layer's: FSDP2 gathers what is converted in float8. It stands in
# place of a layer's name, which it cannot be.
GATHER = "float8 all-gather"

# More steps than a trial takes by default; of longer ones the latest are kept.
MOST_STEPS = 512


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
class RoleGain:
    """What converting one role saves, in milliseconds a training step; below 0 it costs.

    Spreads are standard deviations.

    Attributes:
        name: of the role, such as ``layers.{}.wq``.
        fqns: its layers.
        alone_ms: by the timing of its layers alone.
        alone_spread_ms: of that.
        in_step_ms: in whole steps, beside what the winner converts of the other roles,
            by the model of the step; None where too few steps were counted.
        in_step_spread_ms: of that.
    """

    name: str
    fqns: tuple[str, ...]
    alone_ms: float
    alone_spread_ms: float
    in_step_ms: float | None = None
    in_step_spread_ms: float | None = None


@dataclass(frozen=True)
class TrialSteps:
    """The training steps of a trial in the order in which they ran.

    Attributes:
        first: number of the first one that is kept, from 0.
        plans: of each, the place of its plan in the trial's results; -1 where it was not
            counted, since its plan was being compiled or had not warmed up.
        ms: forward + backward of each, in milliseconds.
    """

    first: int = 0
    plans: tuple[int, ...] = ()
    ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrialRecord:
    """How a trial ended.

    Attributes:
        converted: the layers that the winner converts, and GATHER if it gathers in float8.
        unclear: those that it does not convert, though some plan that does was not
            clearly slower.
        results: of all plans, the fastest first.
        roles: what converting each role saves.
        steps: the latest training steps, at most MOST_STEPS.
    """

    converted: tuple[str, ...]
    unclear: tuple[str, ...]
    results: tuple[TrialResult, ...]
    roles: tuple[RoleGain, ...] = ()
    steps: TrialSteps = TrialSteps()


# Of a plan that was made ahead of training: its run may begin without a trial.
NONE_NEEDED = TrialRecord((), (), ())
