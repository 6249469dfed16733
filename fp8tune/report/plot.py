"""Decisions -> pictures. Needs matplotlib, in the extra "plot".

Every picture can be read in greyscale: verdicts differ by marker and lightness besides
their hue, and cells of the heat map have their numbers written in.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from fp8tune.decision.folding import fold_names
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict
from fp8tune.report.describe import rows_words
from fp8tune.report.heat_map import draw_heat_map, heat_map_inches, tables_of
from fp8tune.report.trial_charts import trial_pictures

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from fp8tune.decision.records import Decision
    from fp8tune.decision.trials import TrialRecord
    from fp8tune.report.trial_charts import TrialPicture

__all__ = [
    "STYLES",
    "heat_map",
    "picture",
    "save",
    "speedups",
    "title_of",
    "trial_figure",
]


class Style(NamedTuple):
    """How an outcome is drawn."""

    label: str
    marker: str
    colour: str
    filled: bool


# Okabe and Ito's colours, which differ in lightness too.
_CONVERTED = Style("converted", "o", "#0072B2", True)
_UNCLEAR = Style("no clear difference", "s", "#777777", False)
_SLOWER = Style("slower: reverted", "v", "#E69F00", True)
_OTHER = Style("reverted for another reason", "D", "#000000", False)
STYLES = (_CONVERTED, _UNCLEAR, _SLOWER, _OTHER)


def _style_of(decision: Decision) -> Style:
    if decision.verdict is Verdict.CONVERTED:
        return _CONVERTED
    known = {
        Reason.NO_CLEAR_DIFFERENCE: _UNCLEAR,
        Reason.SLOWER: _SLOWER,
        Reason.EXPECTED_SLOWER: _SLOWER,
    }
    return known.get(decision.reason, _OTHER)


_WIDTH_INCHES = 10.0
_TITLE_CHARACTERS = 120
_ROW_INCHES = 0.24
# More names than this cannot be read.
_MOST_NAMES = 60
_DPI = 120


def title_of(
    environment: Sequence[tuple[str, str]], recipe: str, timing: str, *, emulated: bool
) -> str:
    """What was compared on which GPU, and in a line below the versions."""
    fields = dict(environment)
    device = fields.pop("device", "an unknown device")
    name = f"{recipe} (emulated)" if emulated else recipe
    versions = ", ".join(f"{field} {value}" for field, value in fields.items())
    what = f"{name} against high precision, timed {timing}, on {device}"
    lines = [textwrap.fill(x, _TITLE_CHARACTERS) for x in (what, versions) if x]
    return "\n".join(lines)


def speedups(
    decisions: Sequence[Decision], title: str, threshold: float = 1.0
) -> Figure:
    """Each kind of layer with its speedup and interval, sorted.

    Args:
        decisions: those without a speedup are only counted.
        title: what to write above.
        threshold: ``min_speedup``, drawn as a line besides the one at 1.0.
    """
    figure = Figure((_WIDTH_INCHES, _speedups_inches(decisions)), layout="constrained")
    _draw_speedups(figure.subplots(), decisions, threshold)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def heat_map(decisions: Sequence[Decision], title: str) -> Figure:
    """M x N with the speedup in each cell, one table per K, as torchao publishes them.

    Args:
        decisions: those that were called with one signature make a cell.
        title: what to write above.
    """
    tables = tables_of(decisions)
    figure = Figure((_WIDTH_INCHES, heat_map_inches(tables)), layout="constrained")
    draw_heat_map(figure, tables)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def picture(
    decisions: Sequence[Decision],
    by_signature: Sequence[Decision],
    title: str,
    threshold: float = 1.0,
    trial: TrialRecord | None = None,
) -> Figure:
    """Both on one sheet, and what a trial of whole plans measured below.

    Args:
        decisions: of the layers.
        by_signature: one for each signature, for the heat map.
        title: what to write above.
        threshold: ``min_speedup``.
        trial: None if there was none.
    """
    tables, tried = tables_of(by_signature), trial_pictures(trial)
    heights = [_speedups_inches(decisions), heat_map_inches(tables)]
    heights += [x.inches for x in tried]
    figure = Figure((_WIDTH_INCHES, sum(heights)), layout="constrained")
    above, below, *rest = cast(
        "Sequence[FigureBase]",
        figure.subfigures(len(heights), 1, height_ratios=heights),
    )
    _draw_speedups(above.subplots(), decisions, threshold)
    draw_heat_map(below, tables)
    for part, shown in zip(rest, tried, strict=True):
        shown.draw(part.subplots())
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def trial_figure(shown: TrialPicture, title: str) -> Figure:
    """One picture of a trial of whole plans.

    Args:
        shown: one of ``fp8tune.report.trial_charts.trial_pictures``.
        title: what to write above.
    """
    # The title takes a part of the height.
    figure = Figure((_WIDTH_INCHES, 0.6 + shown.inches), layout="constrained")
    shown.draw(figure.subplots())
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture in the format of the file's name.

    Raises:
        OSError: it cannot be written.
        ValueError: there is no such format.
    """
    # Text as text, so that an SVG can be searched and copied from.
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=_DPI)


def _timed(decisions: Sequence[Decision]) -> list[tuple[str, Decision]]:
    """(name, decision) of the kinds of layers that have a speedup, the slowest first."""
    known = [x for x in decisions if x.speedup is not None]
    keys = [(x.k, x.n, x.verdict, x.reason, x.recipe, x.signatures) for x in known]
    rows = [
        (f"{name} ×{len(x)}" if len(x) > 1 else name, known[x[0]])  # noqa: RUF001
        for name, x in fold_names([x.fqn for x in known], keys)
    ]
    return sorted(rows, key=lambda row: row[1].speedup or 0.0)


def _speedups_inches(decisions: Sequence[Decision]) -> float:
    return 2.0 + _ROW_INCHES * min(len(_timed(decisions)), _MOST_NAMES)


def _draw_speedups(axes: Axes, decisions: Sequence[Decision], threshold: float) -> None:
    rows = _timed(decisions)
    for style in STYLES:
        _draw_outcome(axes, rows, style)
    axes.axvline(1.0, color="black", linewidth=1)
    if threshold != 1.0:
        label = f"min_speedup {threshold:g}"
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=label)
    _label_rows(axes, rows)
    axes.set_xlabel(
        "speedup of forward + backward, with its interval (above 1: faster)"
    )
    untimed = sum(x.speedup is None for x in decisions)
    axes.set_title(
        f"{len(decisions)} Linears, {untimed} of them not timed", fontsize=9, loc="left"
    )
    axes.grid(axis="x", alpha=0.3)
    if rows:
        # Above the axes, where it hides nothing.
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1),
            borderaxespad=0.2,
            ncols=len(STYLES) + 1,
            fontsize=8,
            frameon=False,
        )
        axes.set_ylim(-0.7, len(rows) - 0.3)


def _draw_outcome(
    axes: Axes, rows: Sequence[tuple[str, Decision]], style: Style
) -> None:
    chosen = [(y, x) for y, (_, x) in enumerate(rows) if _style_of(x) is style]
    if not chosen:
        return
    middles = [x.speedup or 0.0 for _, x in chosen]
    # An interval without an upper end is drawn as far as the picture needs to show it.
    far = 2 * max(x.speedup or 0.0 for _, x in rows)
    lows = [
        m - (x.speedup_low or 0.0) for m, (_, x) in zip(middles, chosen, strict=True)
    ]
    highs = [
        (x.speedup_high or far) - m for m, (_, x) in zip(middles, chosen, strict=True)
    ]
    axes.errorbar(
        middles,
        [y for y, _ in chosen],
        xerr=[lows, highs],
        linestyle="none",
        marker=style.marker,
        color=style.colour,
        markerfacecolor=style.colour if style.filled else "white",
        capsize=2,
        markersize=5,
        label=style.label,
    )


def _label_rows(axes: Axes, rows: Sequence[tuple[str, Decision]]) -> None:
    if len(rows) > _MOST_NAMES:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(rows)} kinds of layers, sorted")
        return
    labels = [f"{name}  {_sizes(decision)}" for name, decision in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)


def _sizes(decision: Decision) -> str:
    rows = rows_words(decision)
    return f"[{rows} × {decision.k} × {decision.n}]"  # noqa: RUF001 - times, not x
