"""The policies that choose what to convert, and how far each is from the best plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

from fp8tune.bench.race import PlanNames, Race
from fp8tune.bench.tuning import Choice, tune
from fp8tune.compiling.dynamo import compile_without_limit
from fp8tune.config import Context, TuneConfig
from fp8tune.decision.intervals import Interval, speedup_interval
from fp8tune.model.allocation import is_out_of_memory
from fp8tune.model.experts import experts_in
from fp8tune.report.progress import log_level

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from fp8tune.bench.sizes import Workload
    from fp8tune.recipes.recipe import Recipe
    from fp8tune.timing.clock import Clock

__all__ = ["FP8TUNE", "Outcome", "Row", "Setting", "compare_policies"]

REFERENCE, ALL, STATIC = "all reference", "all converted", "torchao's static filter"
FP8TUNE, ALONE, CONTEXT = "fp8tune", "  layers alone", "  layers in context"
ORACLE = "oracle"

# 2**6 plans are as many as compile in minutes; those that need not compile are more.
_MOST_GROUPS = 6
_MOST_EAGER_GROUPS = 9
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a comparison is made with.

    Attributes:
        recipe: what Linears and grouped GEMMs are converted to.
        device: where.
        clock: what times.
        compiled: as torch.compile makes it, or eagerly.
        max_seconds: of the race between plans, compilation apart.
        max_compile_seconds: of compiling and warming up plans for the oracle.
    """

    recipe: Recipe
    device: torch.device
    clock: Clock
    compiled: bool
    max_seconds: float
    max_compile_seconds: float


@dataclass(frozen=True)
class Row:
    """What one policy came to.

    Attributes:
        policy: its name.
        converted: the Linears and grouped GEMMs that it converts.
        step_ms: median of forward + backward of the block.
        speedup: time of all reference / its own.
        regret: its time / that of the oracle, or None where there is no oracle.
        peak_bytes: most memory that a step allocates at a time; None on a CPU.
        tuning_s: seconds until its plan was there, where it had to be measured.
        warm_up_s: seconds of those that compiled and warmed up single Linears.
        steps: training steps that tuning took.
        tried: whole plans that were tried in those steps.
    """

    policy: str
    converted: tuple[str, ...]
    step_ms: float
    speedup: Interval
    regret: Interval | None
    peak_bytes: int | None
    tuning_s: float | None
    warm_up_s: float | None
    steps: int | None
    tried: int | None


@dataclass
class Outcome:
    """All policies on one workload.

    Attributes:
        workload: what ran.
        gemms: K, N and E of each Linear and grouped GEMM; E is 0 for a Linear.
        rounds: how often each plan was timed.
        plans: how many plans the oracle chose from.
        rows: one per policy.
        notes: what is missing, and why.
    """

    workload: Workload
    gemms: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    rounds: int = 0
    plans: int = 0
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_policies(workload: Workload, setting: Setting) -> Outcome:
    """Let each policy choose, then time all that they chose, interleaved.

    Out of memory is noted in the outcome, which then has no rows.
    """
    outcome = Outcome(workload)
    try:
        # That nothing is worth converting is an outcome here, and no reason to warn.
        with compile_without_limit(), log_level(logging.ERROR):
            _compare(outcome, setting)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        outcome.rows.clear()
        outcome.notes.append("out of memory")
    return outcome


def _compare(outcome: Outcome, setting: Setting) -> None:
    race = Race(
        outcome.workload,
        setting.recipe,
        setting.device,
        setting.clock,
        compiled=setting.compiled,
    )
    notes = outcome.notes
    outcome.gemms = {name: _sizes(x) for name, x in race.gemms.items()}
    choices = _static_choices(race.gemms, setting.recipe, notes)
    for policy, config in _configs(setting).items():
        choices[policy] = tune(
            outcome.workload,
            setting.recipe,
            setting.device,
            setting.clock,
            config,
            compiled=setting.compiled,
        )
    most = _MOST_GROUPS if setting.compiled else _MOST_EAGER_GROUPS
    possible = _all_plans(outcome.gemms, choices[ALL].plan, most)
    if not possible:
        notes.append(f"no oracle: more than {most} groups of equal GEMMs")
    columns = race.run(
        [x.plan for x in choices.values()],
        possible,
        max_seconds=setting.max_seconds,
        max_compile_seconds=setting.max_compile_seconds,
    )
    outcome.rounds, outcome.plans = len(columns[PlanNames()]), len(columns)
    missing = sum(x not in columns for x in possible)
    if missing:
        notes.append(f"{missing} plans were not compiled in time for the oracle")
    best = min(columns, key=lambda x: median(columns[x])) if possible else None
    if best is not None:
        choices[ORACLE] = Choice(best)
    outcome.rows = [
        _row(policy, choice, columns, best, race.peak_bytes(choice.plan))
        for policy, choice in choices.items()
    ]


def _sizes(gemm: nn.Linear) -> tuple[int, int, int]:
    return gemm.in_features, gemm.out_features, experts_in(gemm)


def _static_choices(
    gemms: dict[str, nn.Linear], recipe: Recipe, notes: list[str]
) -> dict[str, Choice]:
    possible = [name for name, x in gemms.items() if _can_convert(recipe, x)]
    choices = {REFERENCE: Choice(PlanNames()), ALL: Choice(PlanNames(possible))}
    if getattr(recipe, "has_static_filter", False):
        # It knows Linears alone.
        linears = [x for x in possible if not experts_in(gemms[x])]
        kept = [x for x in linears if recipe.static_filter(gemms[x]) is None]
        choices[STATIC] = Choice(PlanNames(kept))
    else:
        notes.append(f"torchao's static filter has no thresholds for {recipe.name}")
    return choices


def _can_convert(recipe: Recipe, gemm: nn.Linear) -> bool:
    if experts_in(gemm) and not getattr(recipe, "takes_experts", False):
        return False
    return recipe.supports(gemm) is None


def _configs(setting: Setting) -> dict[str, TuneConfig]:
    """The default, and in compiled mode what it would be without trials."""
    if not setting.compiled:
        return {FP8TUNE: TuneConfig()}
    return {
        ALONE: TuneConfig(trial_steps=0),
        CONTEXT: TuneConfig(trial_steps=0, context=Context.NORM_ACT),
        FP8TUNE: TuneConfig(),
    }


def _all_plans(
    gemms: dict[str, tuple[int, int, int]], possible: PlanNames, most: int
) -> list[PlanNames]:
    """Every plan that treats GEMMs of one K, N and E alike; none if they are too many."""
    groups: dict[tuple[int, int, int], set[str]] = {}
    for name in sorted(possible):
        groups.setdefault(gemms[name], set()).add(name)
    if len(groups) > most:
        return []
    switches = product((False, True), repeat=len(groups))
    return [
        PlanNames().union(
            *(x for x, on in zip(groups.values(), bits, strict=True) if on)
        )
        for bits in switches
    ]


def _row(
    policy: str,
    choice: Choice,
    columns: dict[PlanNames, tuple[float, ...]],
    best: PlanNames | None,
    peak: int | None,
) -> Row:
    own, reference = columns[choice.plan], columns[PlanNames()]
    return Row(
        policy.strip(),
        tuple(sorted(choice.plan)),
        median(own),
        _ratio(reference, own),
        None if best is None else _ratio(own, columns[best]),
        peak,
        choice.seconds,
        choice.warm_up_s,
        choice.steps,
        choice.tried,
    )


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    pairs = zip(slow, fast, strict=True)
    return speedup_interval([a / b for a, b in pairs], _CONFIDENCE)
