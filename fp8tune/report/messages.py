"""What the log says while a model is tuned. Prints nothing and imports no torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.decision.judge import interval_of
from fp8tune.decision.kinds import fits_range
from fp8tune.model.candidates import LeftOut
from fp8tune.report.describe import describe_signature
from fp8tune.report.table import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp8tune.config import TuneConfig
    from fp8tune.decision.accuracy import Accuracy
    from fp8tune.decision.decisions import Decisions
    from fp8tune.decision.records import Layer, Measurement, Shape
    from fp8tune.model.candidates import Candidate
    from fp8tune.ranks.consensus import Spread

__all__ = [
    "AHEAD_LINE",
    "BYPASSED_LINE",
    "COMPILED_RETUNE",
    "COPIED_LINE",
    "LATE_STATE",
    "NO_GRAPHS_IN_TRIAL",
    "cast_line",
    "changed_line",
    "cost_line",
    "eager_line",
    "measurement_line",
    "measurements_line",
    "no_candidates_line",
    "other_state_line",
    "own_names_line",
    "shape_change",
    "shape_change_line",
    "share_line",
    "spread_lines",
    "start_line",
    "transformed_line",
]

AHEAD_LINE = (
    "planned ahead: the tensors were random numbers, so each SQNR is synthetic; real "
    "activations, communication between ranks and the whole step were not seen. "
    "TuneConfig(trial_steps=400) has the training run confirm the plan"
)

COPIED_LINE = (
    "a model that is being tuned was copied or pickled; the copy is in high precision, "
    "has no plan and is not tuned"
)


NO_GRAPHS_IN_TRIAL = (
    "plans are tried without CUDA graphs, of which each would keep its own memory until "
    "the end of the trial; the plan that wins is compiled with them"
)


BYPASSED_LINE = (
    "training calls other methods than the model's forward, and compile= compiles forward "
    "alone: what is trained stays eager. Pass a callable that compiles the parts that are "
    "called, for example compile=lambda m: [x.compile() for x in m.blocks]"
)


LATE_STATE = (
    "load_tuning_state() in phase {phase} or after a training step; call it right after "
    "AutoFloat8(model), before the first step"
)


COMPILED_RETUNE = (
    "retune() on a compiled model, whose layers cannot be watched. Call auto.abandon(), "
    "which undoes compiling, and wrap it anew: AutoFloat8(auto.module, compile=..., "
    "cache=...)"
)


def other_state_line(lost: Sequence[str]) -> str:
    """A state that was saved of another model, or with other settings."""
    which = f" It converts {', '.join(lost[:5])}, no candidates here." if lost else ""
    return (
        "this tuning state was saved of another model or with another filter."
        f"{which} Load it into the model that it was saved of, with the same arguments"
    )


def own_names_line(model: str, names: Sequence[str]) -> str:
    """The model has methods that the wrapper has too."""
    return (
        f"{model} has its own {', '.join(names)}, and on the wrapper these names are "
        f"fp8tune's. The model's is auto.module.{names[0]}; what tunes is auto.tuner. Go on "
        "using the bare model, and nothing is hidden"
    )


def start_line(screened: Sequence[Candidate | LeftOut], recipe: str) -> str:
    """How many Linears will be timed, and why not the others."""
    number = sum(not isinstance(x, LeftOut) for x in screened)
    what = _word(screened)
    text = f"{number} of {len(screened)} {what} are candidates for {recipe}"
    reasons = _counted_reasons(screened)
    return f"{text}; left out: {reasons}" if reasons else text


def no_candidates_line(screened: Sequence[LeftOut | Candidate]) -> str:
    """What a user reads whose model has nothing to tune."""
    return (
        f"none of the {len(screened)} {_word(screened)} is a candidate "
        f"({_counted_reasons(screened)}), so the model trains on in high precision"
    )


def _word(screened: Sequence[Candidate | LeftOut]) -> str:
    grouped = any(getattr(x.linear, "experts", 0) for x in screened)
    return "GEMMs" if grouped else "Linears"


def _counted_reasons(screened: Sequence[Candidate | LeftOut]) -> str:
    reasons = Counter(x.reason for x in screened if isinstance(x, LeftOut))
    return ", ".join(f"{n} {words(reason)}" for reason, n in reasons.most_common())


def transformed_line(fqn: str) -> str:
    """A candidate is called where its tensors cannot be kept."""
    return (
        f"{fqn or '(root)'} is called under torch.func (grad, vmap and the like), whose "
        "tensors cannot be kept for timing and under which torchao's layers raise; it and "
        "every other Linear that is called so stay in high precision"
    )


def changed_line(fqns: Sequence[str]) -> str:
    """Candidates that are no longer what they were when the model was wrapped."""
    return (
        f"{len(fqns)} Linears were replaced or changed after AutoFloat8 was made and stay "
        f"in high precision: {_named(fqns)}; wrap the model when it is complete"
    )


def cast_line(fqns: Sequence[str]) -> str:
    """Candidates that were cast to a dtype which the recipe does not take."""
    return (
        f"{len(fqns)} Linears have weights of a dtype that the recipe does not take and "
        f"stay in high precision: {_named(fqns)}; cast the model before AutoFloat8"
    )


def _named(fqns: Sequence[str]) -> str:
    shown = ", ".join(x or "(root)" for x in fqns[:5])
    return shown + (f" and {len(fqns) - 5} more" if len(fqns) > 5 else "")


def measurement_line(measurement: Measurement, config: TuneConfig) -> str:
    """One signature and its times, or why there are none."""
    return measurements_line([measurement], config)


def measurements_line(measurements: Sequence[Measurement], config: TuneConfig) -> str:
    """One signature and its times with each recipe."""
    what = describe_signature(measurements[0].signature)
    parts = [_measured(x, config) for x in measurements]
    if len(parts) > 1:
        pairs = zip(measurements, parts, strict=True)
        parts = [f"{x.recipe}: {part}" if x.failure else part for x, part in pairs]
    return f"{what}: {'; '.join(parts)}"


def share_line(mine: int, every: int) -> str:
    """That other ranks time what this one does not."""
    return f"this rank times {mine} of {every} signatures, the other ranks the rest"


def expected_line(timed: int, expected: int) -> str:
    """What ``trust_prior`` leaves to be timed."""
    return (
        f"{timed} of {timed + expected} signatures are timed; {expected} are not, since "
        "their verdicts are expected clearly (trust_prior)"
    )


def cost_line(signatures: int, seconds: float, warm_up_s: float) -> str:
    """What timing took, compilation apart."""
    counted = f"{signatures} signature{'' if signatures == 1 else 's'}"
    return (
        f"timed {counted} in {seconds:.1f} s, of which {warm_up_s:.1f} s went into "
        "compiling and warming up"
    )


def _measured(measurement: Measurement, config: TuneConfig) -> str:
    if measurement.failure:
        return f"{words(measurement.failure)} ({measurement.detail})"
    speedup = interval_of(measurement.ratios, config)
    drawn = ", on random numbers" if measurement.synthetic else ""
    said = measurement.load.said if measurement.load else ""
    unsteady = "" if measurement.steady else ", UNSTEADY: is the machine busy?"
    busy = f" ({said})" if said else ""
    accuracy = measurement.accuracy
    sqnr = f", SQNR {_decibels(accuracy)}" if accuracy else ""
    return (
        f"reference {median(measurement.reference_ms):.3f} ms, "
        f"{measurement.recipe} {median(measurement.candidate_ms):.3f} ms, "
        f"{speedup.middle:.2f}x [{speedup.low:.2f}, {speedup.high:.2f}] "
        f"from {len(measurement.reference_ms)} pairs{sqnr}{drawn}{unsteady}{busy}"
    )


def _decibels(accuracy: Accuracy) -> str:
    worst = accuracy.worst_db
    return "unknown, no finite numbers" if worst is None else f"{worst:.1f} dB"


def spread_lines(spreads: Sequence[Spread]) -> list[str]:
    """How far ranks differ, one line per signature."""
    return [
        f"{describe_signature(x.signature)}, {x.recipe}: fastest {x.fastest_ms:.3f} ms on rank "
        f"{x.fastest_rank}, slowest {x.slowest_ms:.3f} ms on rank {x.slowest_rank}, "
        "which counts"
        for x in spreads
    ]


def shape_change_line(fqn: str, planned: Sequence[Shape], found: Shape) -> str:
    """Which field of a layer's shape is not as the plan has it, with both values."""
    name = fqn or "(root)"
    if not planned:
        return f"{name} is called, which the plan has never seen"
    alike = [x.m for x in planned if dataclasses.replace(x, m=found.m) == found]
    if len(set(alike)) > 1:
        return f"{name}: m was {min(alike)} to {max(alike)}, is {found.m}"
    now = dataclasses.asdict(found)
    differences = [
        [
            f"{field} was {was!r}, is {now[field]!r}"
            for field, was in old
            if was != now[field]
        ]
        for old in (dataclasses.asdict(shape).items() for shape in planned)
    ]
    return f"{name}: " + ", ".join(min(differences, key=len))


def no_common_trial_line(wanted: int | str) -> str:
    """Why stages of a pipeline try no plans, though it was asked for."""
    return (
        f"trial_steps={wanted} asks for a trial of whole plans, but the ranks hold "
        "different layers, as pipeline stages do, and have no plans in common: each "
        "layer is decided by its own times. Give the ranks of each stage a "
        "process_group= of their own to try plans in every stage"
    )


def shape_change(layers: Sequence[Layer], plan: Decisions) -> str | None:
    """What the first call that the plan does not hold for was called with, or None.

    Gradients may differ from those of the plan, which knows them after a backward only.
    """
    for layer in layers:
        planned = [x.shape for x, _ in plan.by_name[layer.fqn].signatures]
        for signature, _ in layer.calls:
            shape = signature.shape
            alike = {x.m for x in planned if dataclasses.replace(x, m=shape.m) == shape}
            if not fits_range(shape.m, alike):
                return shape_change_line(layer.fqn, planned, shape)
    return None


def eager_line(why: str) -> str:
    """That nothing is decided before the first step, which warmup_steps=0 asked for."""
    return (
        f"warmup_steps=0 is not possible here: {why}; the first step runs eagerly, and "
        "the plan is made behind it"
    )
