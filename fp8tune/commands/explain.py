"""``fp8tune explain``: the whole story of one decision, in sentences."""

from __future__ import annotations

import difflib
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from fp8tune.commands.answer import (
    Answer,
    NoEntryError,
    Screen,
    heading_lines,
    layer_data,
    name_of,
    newest_run,
    require_runs,
    run_data,
)
from fp8tune.decision.intervals import FIRST_LOOK
from fp8tune.decision.judge import interval_of
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Verdict
from fp8tune.report.columns import paragraph
from fp8tune.report.describe import describe_signature, sizes_words
from fp8tune.report.trial_story import role_of, trial_sentences
from fp8tune.report.watch import watch_sentences
from fp8tune.store.codec import encode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from fp8tune.decision.records import Decision, Layer, Measurement, Signature
    from fp8tune.store.runs import Run

__all__ = ["answer"]

_BINS = 8
_INDENT = "  "


class _Story(NamedTuple):
    """One signature of the layer."""

    signature: Signature
    calls: int
    measurement: Measurement | None


def answer(arguments: argparse.Namespace, screen: Screen) -> Answer:
    """Why ``arguments.fqn`` was decided as it was in the newest run that has it.

    Raises:
        NoEntryError: no run has a Linear of that name.
    """
    runs = require_runs(arguments.cache, arguments.min_speedup)
    if arguments.run is not None:
        runs_asked = [newest_run(runs, arguments.run, arguments.cache)]
    else:
        runs_asked = runs
    run, index = _find(runs_asked, arguments.fqn, arguments.cache)
    layer, decision = run.layers[index], run.decisions[index]
    alone = run.alone[index]
    stories = [
        _Story(signature, calls, measured)
        for signature, calls in decision.signatures
        for measured in run.measured(signature) or [None]
        # Of a range what was timed is told; the rest follows from it.
        if measured or not sizes_words(decision)
    ]
    first = [*_opening(layer, decision), *_range(decision)]
    fallen = next((x for x in run.fallen if x.fqn == layer.fqn), None)
    last, watched = _ending(alone, run), watch_sentences(fallen)
    tried = trial_sentences(run.trial, alone, run.at_freeze[index])
    lines = [x for text in heading_lines(run, len(runs)) for x in _wrap(text, screen)]
    lines += ["", *_wrap(" ".join(first), screen)]
    for story in stories:
        lines += ["", *_wrap(_told(story, run), screen), *_histogram(story, screen)]
    for text in (last, " ".join(tried), " ".join(watched)):
        lines += ["", *_wrap(text, screen)] if text else []
    told = [_told(story, run) for story in stories]
    sentences = [*first, *told, last, *tried, *watched]
    data = {
        "cache": arguments.cache,
        "run": run_data(run),
        "layer": {"fqn": name_of(layer.fqn)} | layer_data(decision),
        "signatures": [_story_data(story) for story in stories],
        "trial": _trial_data(run, layer.fqn),
        "fallen": fallen and encode(fallen),
        "sentences": sentences,
    }
    return Answer(lines, data)


def _wrap(text: str, screen: Screen) -> list[str]:
    return paragraph(text, screen.width)


def _find(runs: Sequence[Run], fqn: str, path: str) -> tuple[Run, int]:
    for run in reversed(runs):
        for index, layer in enumerate(run.layers):
            if fqn in (layer.fqn, name_of(layer.fqn)):
                return run, index
    names = list({name_of(layer.fqn): None for run in runs for layer in run.layers})
    near = difflib.get_close_matches(fqn, names, 3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise NoEntryError(f"{path} has no Linear named {fqn!r}{hint}")


def _opening(layer: Layer, decision: Decision) -> list[str]:
    converted = decision.verdict is Verdict.CONVERTED
    what = (
        f"is converted to {decision.recipe}" if converted else "stays in high precision"
    )
    gradient = "takes a gradient" if layer.trains else "is frozen"
    weight = f"a {layer.weight_dtype} weight that {gradient}"
    return [
        f"{name_of(layer.fqn)} {what}: {decision.reason.sentence}.",
        f"It has K = {decision.k} inputs and N = {decision.n} outputs, and {weight}.",
    ]


def _range(decision: Decision) -> list[str]:
    said = sizes_words(decision)
    if not said:
        return []
    text = (
        f"Over layers that are called alike: {said}; speedups at the other sizes are "
        "interpolated in log M."
    )
    return [text]


def _told(story: _Story, run: Run) -> str:
    calls = "once" if story.calls == 1 else f"{story.calls} times"
    text = f"The run called it {calls} with {describe_signature(story.signature)}."
    measured = story.measurement
    if measured is None:
        return f"{text} There is no timing of that."
    interval = interval_of(measured.ratios, run.config)
    day = f" on {measured.recorded}" if measured.recorded else ""
    sure = (
        f"with {run.config.confidence:.0%} confidence the true one lies between "
        f"{interval.low:.3f} and {interval.high:.3f}"
        if len(measured.ratios) >= FIRST_LOOK
        else "so slow a candidate is not timed further"
    )
    drawn = " Random numbers stood in for its tensors." if measured.synthetic else ""
    return (
        f"{text} Forward and backward took {median(measured.reference_ms):.3f} ms in "
        f"high precision and {median(measured.candidate_ms):.3f} ms with "
        f"{measured.recipe}, the medians of {len(measured.ratios)} pairs timed{day}. "
        f"The median speedup is {interval.middle:.3f}; {sure}.{drawn}"
    )


def _ending(decision: Decision, run: Run) -> str:
    threshold = f"the threshold of {run.config.min_speedup:.2f}"
    if decision.speedup is None or decision.speedup_low is None:
        return "It was not judged by its speed."
    high = decision.speedup_high
    bounds = f"{decision.speedup_low:.3f} to " + (
        "infinity, since there are too few pairs to bound it"
        if high is None
        else f"{high:.3f}"
    )
    match decision.reason:
        case Reason.FASTER:
            side = "all of it is above"
        case Reason.SLOWER:
            side = "all of it is below"
        case _:
            side = "it reaches from one side to the other of"
    return (
        f"Over all its calls the interval of the speedup is {bounds}; {side} "
        f"{threshold}. A layer is converted only if all of the interval is above."
    )


def _histogram(story: _Story, screen: Screen) -> list[str]:
    """The speedups of the pairs as bars, at most as wide as the screen."""
    if story.measurement is None:
        return []
    ratios = story.measurement.ratios
    low, high = min(ratios), max(ratios)
    number = min(_BINS, len(ratios)) if high > low else 1
    step = (high - low) / number
    counts = [0] * number
    for ratio in ratios:
        counts[min(int((ratio - low) / step), number - 1) if step else 0] += 1
    longest = min(max(counts), screen.width - len("  0.000 to 0.000  999 "))
    return [
        "",
        f"{_INDENT}speedup of a pair",
        *(
            f"{_INDENT}{low + i * step:.3f} to {low + (i + 1) * step:.3f} {count:>4} "
            + "#" * round(longest * count / max(counts))
            for i, count in enumerate(counts)
        ),
    ]


def _story_data(story: _Story) -> dict[str, Any]:
    measured = story.measurement
    return {
        "signature": encode(story.signature),
        "calls": story.calls,
        "reference_ms": list(measured.reference_ms) if measured else [],
        "candidate_ms": list(measured.candidate_ms) if measured else [],
        "speedups": measured.ratios if measured else [],
        "synthetic": bool(measured and measured.synthetic),
        "recorded": (measured.recorded or None) if measured else None,
    }


def _trial_data(run: Run, fqn: str) -> dict[str, Any] | None:
    if run.trial is None:
        return None
    role = role_of(run.trial, fqn)
    plans = [encode(x) for x in run.trial.results]
    return {"plans": plans, "role": role and encode(role)}
