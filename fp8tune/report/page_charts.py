"""Figures of matplotlib -> SVG that stands in a page. Needs the extra "plot".

matplotlib draws the same pictures for files and TensorBoard, keeps text as text, and
needs no script in the page, so they are seen without JavaScript and when printed.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from fp8tune.report import plot
from fp8tune.report.trial_charts import trial_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fp8tune.report.subject import Subject
    from fp8tune.report.trial_charts import TrialPicture

__all__ = ["charts_of", "inline_svg"]

# More marks than this are drawn as one image, since each would be an element.
_MOST_MARKS = 400
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fp8tune"}
_BARE = {"Date": None, "Creator": None, "Format": None, "Type": None}
# Names of groups such as figure_1, which would stand twice in a page of two pictures;
# nothing refers to them. What is referred to has a hash in its name.
_GROUP = re.compile(r' id="[A-Za-z]+\d*_\d+"')
_COLOURS = {"#ffffff": "var(--page)", "#000000": "currentColor"}


def charts_of(subject: Subject) -> dict[str, Any]:
    """The pictures of a page by the name of their part."""
    speedups = plot.speedups(subject.plan.decisions, "", subject.min_speedup)
    return {
        "speedups": inline_svg(speedups, "Speedups of the kinds of layers, sorted"),
        "trials": _trial_charts(subject),
    }


def _trial_charts(subject: Subject) -> list[tuple[Markup, str]]:
    """(picture, caption) of what whole training steps measured."""
    return [(_drawn(x), x.caption) for x in trial_pictures(subject.plan.trial)]


def _drawn(picture: TrialPicture) -> Markup:
    figure = Figure((10, picture.inches), layout="constrained")
    picture.draw(figure.subplots())
    return inline_svg(figure, picture.label)


def inline_svg(figure: Figure, label: str) -> Markup:
    """A figure as one element of a page, in the page's own colours.

    Args:
        figure: drawn in black on white where it has no meaning in its colours.
        label: what a screen reader says in its place.
    """
    for axes in figure.axes:
        if _marks(axes) > _MOST_MARKS:
            for artist in (*axes.collections, *axes.lines):
                artist.set_rasterized(True)
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format="svg", metadata=_BARE, dpi=120)
    text = _GROUP.sub("", buffer.getvalue())
    for colour, ours in _COLOURS.items():
        text = text.replace(colour, ours)
    start, end = text.index("<svg"), text.index(">", text.index("<svg"))
    box = re.findall(r'viewBox="[\d. ]+"', text[start:end])
    opening = Markup('<svg role="img" aria-label="{}" {}>').format(
        label, *map(Markup, box)
    )
    return opening + Markup(text[end + 1 :])  # noqa: S704 - matplotlib escapes its texts


def _marks(axes: Axes) -> int:
    lines = sum(np.size(x.get_xdata()) for x in axes.lines)
    return lines + sum(len(x.get_paths()) for x in axes.collections)
