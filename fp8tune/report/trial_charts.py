"""What a trial of whole plans measured -> pictures. Needs matplotlib.

A plan has one colour and one marker in all of them, so they can be read in greyscale.
"""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fp8tune.report.trials import plan_name, winner_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from fp8tune.decision.trials import RoleGain, TrialRecord, TrialResult

__all__ = ["TrialPicture", "trial_pictures"]

# Okabe and Ito's colours, which differ in lightness too; the others are grey.
_PLANS = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
)
_FURTHER = ("#999999", "X")
_REFERENCE = ("#666666", "h")
_NOT_COUNTED = ("#aaaaaa", "x")
_MOST_PLANS = 40
_MOST_ROLES = 60
_LABEL = 45  # characters of a name, which the table has in full
_ROW_INCHES, _FRAME_INCHES, _STEPS_INCHES = 0.3, 1.2, 4.0
# Steps longer than this times the typical one are compiling, or spikes; they are drawn at
# the upper edge.
_OFF_SCALE = 1.5


class TrialPicture(NamedTuple):
    """One picture.

    Attributes:
        name: short, for file names and tags.
        label: what it is, for those who do not see it.
        caption: how to read it.
        inches: its height.
        draw: draws it.
    """

    name: str
    label: str
    caption: str
    inches: float
    draw: Callable[[Axes], None]


def trial_pictures(trial: TrialRecord | None) -> list[TrialPicture]:
    """The pictures of a trial; fewer for one of an older file, which knows less."""
    if trial is None or not trial.results:
        return []
    plans = trial.results[:_MOST_PLANS]
    pictures = [
        TrialPicture(
            "plans",
            "Trial plans by their step time",
            "Plans by the time of their training steps, forward and backward, with its "
            "interval; the fastest at the top. A hollow mark has too few rounds for one.",
            _FRAME_INCHES + _ROW_INCHES * len(plans),
            partial(_draw_plans, trial=trial),
        )
    ]
    roles = [x for x in trial.roles if x.in_step_ms is not None][:_MOST_ROLES]
    if roles:
        pictures.append(
            TrialPicture(
                "roles",
                "What converting each role saves, alone and in training steps",
                "What converting each role saves a training step: by the timing of its "
                "layers alone, and in whole steps beside the rest of the plan that was "
                "kept; bars are two standard deviations.",
                _FRAME_INCHES + _ROW_INCHES * len(roles),
                partial(_draw_roles, roles=roles),
            )
        )
    if trial.steps.ms:
        pictures.append(
            TrialPicture(
                "steps",
                "Training steps of the trial by plan, until the plan froze",
                "The training steps as they came, coloured by plan as above. Grey "
                "crosses were not counted, since their plan was being compiled or had "
                "not warmed up; marks at the upper edge took longer. At the line at the "
                "right the plan froze.",
                _STEPS_INCHES,
                partial(_draw_steps, trial=trial),
            )
        )
    return pictures


def _styles(trial: TrialRecord) -> list[tuple[str, str]]:
    """(colour, marker) of each of the results."""
    free = iter(_PLANS)
    return [next(free, _FURTHER) if x.converted else _REFERENCE for x in trial.results]


def _names(trial: TrialRecord) -> list[str]:
    """Short names of the results, which say what the plans do not have in common."""
    every = sorted({x.name for x in trial.roles})
    cut = _common([x.split(".")[:-1] for x in every])
    return [_short(_name(x, every, cut)) for x in trial.results]


def _common(modules: Sequence[Sequence[str]]) -> int:
    """Characters of what all names begin with, dots included."""
    together = takewhile(lambda x: len(set(x)) == 1, zip(*modules, strict=False))
    return sum(len(x[0]) + 1 for x in together)


def _name(result: TrialResult, every: Sequence[str], cut: int) -> str:
    left = [x[cut:] for x in every if x not in result.converted]
    if every and len(left) < len(result.converted):
        return f"all but {', '.join(left)}" if left else "everything converted"
    return ", ".join(x[cut:] for x in result.converted) or plan_name(result)


def _short(name: str) -> str:
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"


def _draw_plans(axes: Axes, trial: TrialRecord) -> None:
    plans = trial.results[:_MOST_PLANS]
    reference = next((x for x in trial.results if not x.converted), plans[-1])
    names, styles = _names(trial), _styles(trial)
    for place, x in enumerate(plans):
        colour, marker = styles[place]
        middle, *spread = _times(x, reference.step_ms * reference.speedup)
        axes.errorbar(
            [middle],
            [len(plans) - 1 - place],
            xerr=[[y] for y in spread],
            marker=marker,
            color=colour,
            markerfacecolor="white" if x.speedup_high is None else colour,
            capsize=2,
        )
    labels = [
        f"{name}  {x.step_ms:.2f} ms, {x.rounds} rounds"
        for name, x in zip(names, plans, strict=False)
    ]
    axes.set_yticks(range(len(plans)), labels[::-1], fontsize=8, parse_math=False)
    axes.axvline(reference.step_ms, color="black", linewidth=1)
    axes.set_xlabel("milliseconds of a training step (left of the line: faster)")
    axes.grid(axis="x", alpha=0.3)


def _times(x: TrialResult, reference_ms: float) -> tuple[float, float, float]:
    """Step time by the paired speedup, and how far its interval reaches down and up.

    No further than itself where too few rounds bound it.
    """
    if not x.speedup or not x.speedup_low or not x.speedup_high:
        return (reference_ms / x.speedup if x.speedup else x.step_ms), 0.0, 0.0
    middle = reference_ms / x.speedup
    down, up = middle - reference_ms / x.speedup_high, reference_ms / x.speedup_low
    return middle, max(0.0, down), max(0.0, up - middle)


def _draw_roles(axes: Axes, roles: Sequence[RoleGain]) -> None:
    rows = sorted(roles, key=lambda x: x.in_step_ms or 0.0)
    heights = range(len(rows))
    axes.errorbar(
        [x.alone_ms for x in rows],
        [y + 0.15 for y in heights],
        xerr=[2 * x.alone_spread_ms for x in rows],
        linestyle="none",
        marker="s",
        color="#777777",
        markerfacecolor="white",
        capsize=2,
        label="alone",
    )
    axes.errorbar(
        [x.in_step_ms or 0.0 for x in rows],
        [y - 0.15 for y in heights],
        xerr=[2 * (x.in_step_spread_ms or 0.0) for x in rows],
        linestyle="none",
        marker="o",
        color="#0072B2",
        capsize=2,
        label="in training steps",
    )
    labels = [f"{_short(x.name)} ({len(x.fqns)})" for x in rows]
    axes.set_yticks(heights, labels, fontsize=8, parse_math=False)
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set_xlabel("milliseconds saved in a training step (right of the line: faster)")
    axes.grid(axis="x", alpha=0.3)
    _legend(axes, 2)


def _draw_steps(axes: Axes, trial: TrialRecord) -> None:
    steps = trial.steps
    names, styles = _names(trial), _styles(trial)
    rows = list(zip(steps.plans, steps.ms, strict=True))
    top = _OFF_SCALE * median([ms for place, ms in rows if place >= 0] or steps.ms)
    for place in sorted(set(steps.plans)):
        numbers = [steps.first + i for i, (x, _) in enumerate(rows) if x == place]
        times = [min(ms, top) for x, ms in rows if x == place]
        colour, marker = styles[place] if place >= 0 else _NOT_COUNTED
        axes.plot(
            numbers,
            times,
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=4,
            label=names[place] if place >= 0 else "not counted",
        )
    winner = winner_of(trial)
    if winner:
        axes.axhline(winner.step_ms, color="black", linestyle=":", linewidth=1)
    end = steps.first + len(rows)
    axes.axvline(end, color="black", linewidth=1)
    axes.annotate(
        "frozen", (end, top), ha="right", va="bottom", fontsize=8, annotation_clip=False
    )
    axes.set_ylim(top=1.02 * top)
    axes.set_xlabel("training step of the trial")
    axes.set_ylabel("milliseconds")
    axes.grid(axis="y", alpha=0.3)
    if len(set(steps.plans)) <= len(_PLANS) + 2:
        _legend(axes, 4)


def _legend(axes: Axes, columns: int) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=columns,
        fontsize=8,
        frameon=False,
    )
