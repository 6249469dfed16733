"""Pictures: what is in them, and that they can be read without colours."""

import io
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgb

from fp8tune.config import TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Shape, Signature, Verdict
from fp8tune.decision.trials import TrialSteps
from fp8tune.report import plot
from fp8tune.report.trial_charts import trial_pictures
from fp8tune.store.runs import load_runs

VERSIONS = (("device", "Imaginary 1000"), ("torch", "2.13.0"), ("torchao", "0.18.0"))
TITLE = plot.title_of(VERSIONS, "rowwise", "compiled", emulated=False)


def signature(m, k, n):
    return Signature(Shape(m, k, n, "bfloat16", "bfloat16", None, False), *[True] * 3)


def decision(fqn, speedup, *, m=8192, k=4096, n=1024, high=0.02, reason=None):
    reasons = {True: Reason.FASTER, False: Reason.SLOWER}
    reason = reason or reasons[speedup > 1]
    faster = reason is Reason.FASTER
    return Decision(
        fqn,
        k,
        n,
        Verdict.CONVERTED if faster else Verdict.REFERENCE,
        reason,
        recipe="rowwise" if faster else None,
        signatures=((signature(m, k, n), 3),),
        reference_ms=1.0,
        candidate_ms=1 / speedup,
        speedup=speedup,
        speedup_low=speedup - 0.02,
        speedup_high=None if high is None else speedup + high,
        samples=16,
    )


def untimed(fqn):
    return Decision(fqn, 64, 64, Verdict.REFERENCE, Reason.SMALL_KN)


SEVERAL = [
    decision("layers.0.wq", 1.2),
    decision("layers.1.wq", 1.2),
    decision("layers.0.wk", 0.8, n=512),
    decision("layers.0.wo", 1.0, n=2048, reason=Reason.NO_CLEAR_DIFFERENCE),
    untimed("head"),
]


def words(figure):
    """The text of a picture, from top to bottom."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    root = ET.fromstring(file.getvalue())  # noqa: S314 - written one line above
    return [
        "".join(x.itertext()) for x in root.iter("{http://www.w3.org/2000/svg}text")
    ]


def test_the_title_says_gpu_recipe_and_versions():
    assert TITLE.splitlines() == [
        "rowwise against high precision, timed compiled, on Imaginary 1000",
        "torch 2.13.0, torchao 0.18.0",
    ]
    emulated = plot.title_of(VERSIONS, "rowwise", "eager", emulated=True)
    assert emulated.startswith("rowwise (emulated) against")


def test_a_long_title_is_broken():
    many = tuple((f"field{i}", "a long value") for i in range(20))
    lines = plot.title_of(many, "rowwise", "eager", emulated=False).splitlines()
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("draw", [plot.speedups, plot.heat_map])
def test_every_picture_carries_the_title(draw):
    text = words(draw(SEVERAL, TITLE))
    assert TITLE.splitlines() == [line for line in text if line in TITLE.splitlines()]


def test_layers_are_sorted_and_folded():
    figure = plot.speedups(SEVERAL, TITLE)
    (axes,) = figure.axes
    labels = [label.get_text().split("  ")[0] for label in axes.get_yticklabels()]
    # The axis grows upwards: the fastest is at the top.
    assert labels == ["layers.0.wk", "layers.0.wo", "layers.{0..1}.wq ×2"]  # noqa: RUF001
    assert "5 Linears, 1 of them not timed" in words(figure)


def test_each_outcome_has_its_marker_in_the_legend():
    accuracy = decision("layers.0.wv", 1.1, n=256, reason=Reason.ACCURACY)
    text = words(plot.speedups([*SEVERAL, accuracy], TITLE))
    for style in plot.STYLES:
        assert style.label in text


def test_there_is_a_line_at_one_and_at_the_threshold():
    (axes,) = plot.speedups(SEVERAL, TITLE, 1.1).axes
    lines = [tuple(x.get_xdata()) for x in axes.lines if len(x.get_xdata()) == 2]
    assert {(1.0, 1.0), (1.1, 1.1)} <= set(lines)


def test_the_interval_is_drawn_around_the_speedup():
    (axes,) = plot.speedups([decision("wq", 1.2)], TITLE).axes
    ((segment,),) = [x.get_segments() for x in axes.collections]
    assert sorted(x for x, _ in segment) == pytest.approx([1.18, 1.22])


def test_an_interval_without_an_end_leaves_the_picture():
    (axes,) = plot.speedups([decision("wq", 1.2, high=None)], TITLE).axes
    ((segment,),) = [x.get_segments() for x in axes.collections]
    assert max(x for x, _ in segment) == pytest.approx(2.4)


def test_outcomes_differ_in_grey():
    """By lightness, and by marker."""
    grey = [
        0.299 * r + 0.587 * g + 0.114 * b
        for r, g, b in (to_rgb(style.colour) for style in plot.STYLES)
    ]
    ordered = sorted(grey)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.07
    assert len({style.marker for style in plot.STYLES}) == 4


def test_the_heat_map_is_a_table_of_m_and_n_per_k():
    decisions = [
        decision("a", 1.31, m=1024, k=2048, n=1024),
        decision("b", 0.74, m=8192, k=2048, n=4096),
        decision("c", 1.5, m=1024, k=4096, n=1024),
    ]
    figure = plot.heat_map(decisions, TITLE)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert list(panels) == ["K = 2048", "K = 4096"]
    first = panels["K = 2048"]
    assert [x.get_text() for x in first.get_xticklabels()] == ["1024", "4096"]
    assert [x.get_text() for x in first.get_yticklabels()] == ["1024", "8192"]
    cells = {tuple(x.get_position()): x.get_text() for x in first.texts}
    assert cells == {(0, 0): "1.31", (1, 1): "0.74 ↓"}


def test_the_slowest_signature_of_a_shape_counts():
    pair = [decision("a", 1.3), decision("b", 1.1), decision("c", 1.2)]
    (axes,) = (x for x in plot.heat_map(pair, TITLE).axes if x.axison)
    assert [x.get_text() for x in axes.texts] == ["1.10"]


def test_lightness_grows_with_the_speedup():
    (axes,) = (x for x in plot.heat_map(SEVERAL, TITLE).axes if x.axison)
    (image,) = axes.images
    colours = [image.cmap(image.norm(value)) for value in (0.8, 1.0, 1.2)]
    lightness = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in colours]
    assert lightness == sorted(lightness)
    assert lightness[-1] - lightness[0] > 0.5


@pytest.mark.parametrize("number", [0, 1, 60, 61, 500])
def test_any_number_of_layers_makes_a_picture(number):
    decisions = [
        decision(f"w{i}", 0.5 + i / 100, n=16 * (i + 1), k=16 * (i % 20 + 1))
        for i in range(number)
    ]
    figure = plot.picture(decisions, decisions, TITLE)
    assert figure.get_figheight() < 60
    named = [x for x in words(figure) if x.startswith("w")]
    assert len(named) == (number if number <= 60 else 0)


def test_names_are_no_mathematics():
    text = words(plot.speedups([decision("a$x^2$b_{c}", 1.2)], "a $title$"))
    assert any(x.startswith("a$x^2$b_{c}") for x in text)
    assert "a $title$" in text


# Trials


def drawn(trial):
    """Name -> axes."""
    return {x.name: plot.trial_figure(x, TITLE).axes[0] for x in trial_pictures(trial)}


@pytest.fixture
def tried(tried_cache):
    (run,) = load_runs(tried_cache, TuneConfig())
    return run


def test_a_trial_is_drawn_below_the_layers(tried):
    text = words(plot.picture(tried.decisions, tried.by_signature, TITLE))
    assert "frozen" not in text
    figure = plot.picture(tried.decisions, tried.by_signature, TITLE, trial=tried.trial)
    text = words(figure)
    assert "milliseconds of a training step (left of the line: faster)" in text
    assert "nothing converted  100.00 ms, 16 rounds" in text
    assert "layers.{}.attention.wo (2)" in text
    assert {"alone", "in training steps", "frozen"} <= set(text)


def test_a_plan_stands_at_its_step_time_with_its_interval(tried):
    axes = drawn(tried.trial)["plans"]
    found = [x.lines[0].get_xdata()[0] for x in axes.containers]
    times = [x.step_ms for x in tried.trial.results]
    assert found == pytest.approx(times, rel=1e-3)
    # Too few rounds make no interval, and a hollow mark.
    unbound = [x.speedup_high is None for x in tried.trial.results]
    assert True in unbound
    hollow = [x.lines[0].get_markerfacecolor() == "white" for x in axes.containers]
    assert hollow == unbound
    labels = [x.get_text() for x in axes.get_yticklabels()][::-1]
    assert labels[0] == "all but attention.wo  70.75 ms, 10 rounds"
    assert labels[1].startswith("everything converted  74.75 ms")


def test_what_roles_save_alone_stands_beside_what_they_save_in_steps(tried):
    alone, in_step = drawn(tried.trial)["roles"].containers
    rows = sorted(tried.trial.roles, key=lambda x: x.in_step_ms)
    assert list(alone.lines[0].get_xdata()) == [x.alone_ms for x in rows]
    assert list(in_step.lines[0].get_xdata()) == [x.in_step_ms for x in rows]
    (bars,) = in_step.lines[2]
    low, high = bars.get_segments()[0][:, 0]
    assert high - low == pytest.approx(4 * rows[0].in_step_spread_ms)


def test_steps_are_coloured_by_plan_until_the_freeze(tried):
    pictures, steps = drawn(tried.trial), tried.trial.steps
    lines = [x for x in pictures["steps"].lines if x.get_linestyle() == "None"]
    numbers = sorted(int(n) for x in lines for n in x.get_xdata())
    assert numbers == list(range(len(steps.ms)))
    colours = [x.lines[0].get_color() for x in pictures["plans"].containers]
    for line, place in zip(lines, sorted(set(steps.plans)), strict=True):
        assert (line.get_color() == colours[place]) == (place >= 0)
    markers = {(x.get_color(), x.get_marker()) for x in lines}
    assert len(markers) == len(lines)
    # Compiling took 40 s; the picture does not.
    assert max(steps.ms) > 4e4
    assert pictures["steps"].get_ylim()[1] < 200
    assert pictures["steps"].get_xlim()[1] >= len(steps.ms)


def test_a_trial_of_an_older_file_is_drawn_as_far_as_it_is_known(tried):
    known = replace(tried.trial, roles=(), steps=TrialSteps())
    assert list(drawn(known)) == ["plans"]
    assert drawn(replace(known, results=())) == {} == drawn(None)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_both_formats_are_written(llama_cache, tmp_path, suffix):
    run = load_runs(llama_cache, TuneConfig())[0]
    path = tmp_path / f"picture{suffix}"
    plot.save(plot.picture(run.decisions, run.by_signature, TITLE), path)
    magic = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert path.read_bytes().startswith(magic[suffix])


def test_a_ragged_layer_has_a_cell_for_each_of_its_sizes(llama_cache):
    run = load_runs(llama_cache, TuneConfig())[0]
    figure = plot.heat_map(run.by_signature, TITLE)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    rows = [x.get_text() for x in panels["K = 4096"].get_yticklabels()]
    assert rows == ["17", "8192"]


def test_a_missing_matplotlib_says_what_to_install(llama_cache):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fp8tune.commands.cli import main\n"
        f"sys.exit(main(['plot', {str(llama_cache)!r}, '-o', 'x.png']))"
    )
    run = subprocess.run(  # noqa: S603 - runs these lines
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert 'pip install "fp8tune[plot]"' in run.stderr
    assert not Path("x.png").exists()
    assert json.dumps(run.stdout) == '""'
