"""What people read: the table of a plan, and the lines in the log."""

import itertools
import re
import subprocess
import sys

import pytest
from torch import nn

from fp8tune.config import TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Measurement, Shape, Signature, Verdict
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.plan.plan import Plan
from fp8tune.report.describe import describe_signature
from fp8tune.report.messages import (
    measurement_line,
    no_candidates_line,
    shape_change_line,
    start_line,
)
from fp8tune.report.stuck import stuck_line
from fp8tune.report.table import fold, table_lines
from tests.helpers import signature

SHAPE = Shape(8192, 4096, 1024, "bfloat16", "bfloat16", None, False)
SIGNATURE = Signature(SHAPE, grad_input=True, grad_weight=True, grad_bias=False)
LINEAR = nn.Linear(1, 1, device="meta")
# No table of these tests needs more.
WIDE = 200


def untimed(fqn, reason, rows=(), detail=""):
    calls = tuple((signature(m, 4096, 1024), 3) for m in rows)
    verdict = Verdict.REFERENCE
    return Decision(
        fqn, 4096, 1024, verdict, reason, signatures=calls, detail=detail, samples=0
    )


def timed(fqn, reason=Reason.FASTER, *, rows=(8192,), high=1.234, n=1024):
    """A layer of 1.5 ms that takes 1.25 ms when converted, or the other way round."""
    faster = reason is Reason.FASTER
    return Decision(
        fqn,
        4096,
        n,
        Verdict.CONVERTED if faster else Verdict.REFERENCE,
        reason,
        recipe="rowwise" if faster else None,
        signatures=tuple((signature(m, 4096, 1024), 3) for m in rows),
        reference_ms=1.5,
        candidate_ms=1.25 if faster else 2.0,
        speedup=1.2 if faster else 0.75,
        speedup_low=1.181 if faster else 0.7,
        speedup_high=high if faster else 0.8,
        samples=16,
    )


def plan_of(*decisions, emulated=False, recipe="rowwise"):
    environment = (("device", "Imaginary 1000"), ("torch", "2.13.0"))
    return Plan(decisions, recipe, "bfloat16", emulated, "compiled", environment)


def words(*decisions, **options):
    """The lines of a wide table and its footer, each with single spaces."""
    lines = table_lines(plan_of(*decisions, **options), WIDE)
    return [" ".join(line.split()) for line in lines]


def names(decisions):
    return [name for name, _ in fold(decisions)]


def expanded(pattern):
    """layers.{0..1,4}.wq -> the three names that it stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [
        numbers(part) if i % 2 else [part] for i, part in enumerate(parts) if part
    ]
    return {"".join(chosen) for chosen in itertools.product(*choices)}


def numbers(ranges):
    ends = [run.split("..") for run in ranges.split(",")]
    return [str(i) for run in ends for i in range(int(run[0]), int(run[-1]) + 1)]


def a_llama():
    """32 blocks of three kinds of layers, as most tables are."""
    slower, filtered = Reason.SLOWER, Reason.FILTERED_BY_NAME
    for i in range(32):
        yield timed(f"layers.{i}.attention.wq", n=14336)
        yield timed(f"layers.{i}.attention.wk", slower, rows=(512, 8192))
        yield untimed(f"layers.{i}.feed_forward.w1", Reason.NO_CLEAR_DIFFERENCE)
    yield untimed("output", filtered)


def test_the_table_has_a_row_per_kind_of_layer_and_a_summary():
    decisions = [timed(f"{i}.wq") for i in range(32)]
    decisions += [timed(f"{i}.wk", Reason.SLOWER) for i in range(32)]
    lines = words(*decisions, untimed("head", Reason.FILTERED_BY_NAME))
    assert lines[0] == "layer M K N reference ms candidate ms speedup verdict"
    assert set(lines[1]) == {"─"}
    assert lines[2:5] == [
        "{0..31}.wq 8192 4096 1024 1.500 1.250 1.20 [1.18, 1.23] rowwise: faster",
        "{0..31}.wk 8192 4096 1024 1.500 2.000 0.75 [0.70, 0.80] reference: slower",
        "head - 4096 1024 - - - reference: filtered by name",
    ]
    assert lines[5].startswith("converted 32 of 65 Linears to rowwise; not converted: ")
    assert lines[6:] == ["timed compiled against bfloat16 on Imaginary 1000"]


def test_columns_are_told_apart_at_the_usual_width():
    lines = table_lines(plan_of(timed("layers.0.wq"), timed("wk", Reason.SLOWER)))
    columns = [re.split(" {2,}", line.strip()) for line in lines]
    assert columns[0] == (
        ["layer", "M", "K", "N", "reference ms", "candidate ms", "speedup", "verdict"]
    )
    assert columns[2][0::7] == ["layers.0.wq", "rowwise: faster"]
    assert columns[3][0::7] == ["wk", "reference: slower"]


def test_gaps_in_a_stack_are_shown():
    different = {1: Reason.SLOWER, 6: Reason.SLOWER}
    stack = [timed(f"layers.{i}.wq", different.get(i, Reason.FASTER)) for i in range(7)]
    assert names(stack) == ["layers.{0,2..5}.wq", "layers.{1,6}.wq"]


def test_a_single_layer_keeps_its_name():
    assert names([timed("layers.7.wq")]) == ["layers.7.wq"]


def test_the_root_has_a_name():
    assert names([timed("")]) == ["(root)"]


def test_layers_of_different_sizes_do_not_share_a_row():
    assert names([timed("0"), timed("1", n=2048), timed("2")]) == ["{0,2}", "1"]


def test_layers_called_differently_do_not_share_a_row():
    assert len(names([timed("0"), timed("1", rows=(512,))])) == 2


def test_numbers_inside_words_are_part_of_the_name():
    assert names([timed("0.w1"), timed("0.w2"), timed("1.w1")]) == ["{0..1}.w1", "0.w2"]


def test_folded_names_stand_for_all_layers_and_no_other():
    experts = [(0, 1), (1, 0), (1, 1), (2, 2)]
    fqns = [f"layers.{i}.experts.{j}.w1" for i, j in experts]
    shown = [expanded(name) for name in names(timed(fqn) for fqn in fqns)]
    assert sorted(itertools.chain(*shown)) == fqns


def test_several_sizes_of_batches_are_listed_in_order():
    row = words(timed("wq", rows=(8192, 16, 512)))[2]
    assert row.startswith("wq 16,512,8192 4096 1024")


def test_an_unbounded_interval_says_so():
    assert "1.20 [1.18, inf]" in words(timed("wq", high=None))[2]


def test_failures_are_listed_once_below():
    failures = [
        untimed(f"layers.{i}.wq", Reason.OUT_OF_MEMORY, (8192,), "MemoryError: 3 GB")
        for i in range(4)
    ]
    other = untimed("head", Reason.NOT_MEASURED, (8192,), "ValueError: no")
    lines = words(other, *failures)
    assert lines[2] == "head 8192 4096 1024 - - - reference: not measured"
    assert lines[3] == (
        "layers.{0..3}.wq 8192 4096 1024 - - - reference: out of memory"
    )
    assert lines[-2:] == ["not timed: MemoryError: 3 GB", "not timed: ValueError: no"]


def test_emulation_is_said():
    text = " ".join(words(timed("wq"), emulated=True))
    assert "converted 1 of 1 Linears to rowwise (emulated)" in text
    assert "its times are not those of float8 hardware" in text


def test_hardware_is_not_called_emulated():
    assert "emulated" not in " ".join(words(timed("wq")))


def test_names_are_no_markup():
    assert words(timed("[bold]wq[/bold]"))[2].startswith("[bold]wq[/bold] 8192")


def test_a_plan_without_a_linear_has_a_table():
    assert words()[-2] == "converted 0 of 0 Linears to rowwise"


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("emulated", [False, True])
def test_every_line_fits(width, emulated):
    plan = plan_of(*a_llama(), emulated=emulated, recipe="rowwise_with_gw_hp")
    assert [x for x in table_lines(plan, width) if len(x) > width] == []


@pytest.mark.parametrize("width", [80, 110])
def test_no_number_is_cut(width):
    text = "\n".join(table_lines(plan_of(*a_llama()), width))
    for cell in ("8192", "4096", "14336", "1.500", "1.250", "[1.18, 1.23]"):
        assert cell in text


def test_names_of_a_usual_model_are_not_broken_at_110_columns():
    text = "\n".join(table_lines(plan_of(*a_llama()), 110))
    assert "layers.{0..31}.attention.wq" in text
    assert "layers.{0..31}.feed_forward.w1" in text


@pytest.mark.parametrize("width", [80, 110])
def test_no_column_disappears(width):
    header = table_lines(plan_of(*a_llama()), width)[0].split()
    assert header[0] == "layer"
    assert header[-1] == "verdict"


def test_a_measurement_is_one_line():
    times = ((1.5,) * 8, (1.25,) * 8)
    line = measurement_line(Measurement(SIGNATURE, "rowwise", *times), TuneConfig())
    assert line == (
        "M=8192 K=4096 N=1024, bfloat16, grads of input+weight: reference 1.500 ms, "
        "rowwise 1.250 ms, 1.20x [1.20, 1.20] from 8 pairs"
    )


def test_a_measurement_with_few_pairs_shows_that_nothing_bounds_it():
    measurement = Measurement(SIGNATURE, "rowwise", (2.0,), (1.0,), synthetic=True)
    line = measurement_line(measurement, TuneConfig())
    assert line.endswith("2.00x [0.00, inf] from 1 pairs, on random numbers")


def test_a_failed_measurement_says_why():
    measurement = Measurement(
        SIGNATURE, "rowwise", failure=Reason.OUT_OF_MEMORY, detail="MemoryError: 3 GB"
    )
    assert measurement_line(measurement, TuneConfig()) == (
        "M=8192 K=4096 N=1024, bfloat16, grads of input+weight: out of memory "
        "(MemoryError: 3 GB)"
    )


def test_a_signature_says_what_is_unusual():
    shape = Shape(17, 64, 32, "bfloat16", "float32", "bfloat16", True)
    frozen = Signature(shape, False, False, False)
    assert describe_signature(frozen) == (
        "M=17 K=64 N=32, bfloat16 x float32 under bfloat16 autocast, forward only"
    )
    recomputed = Signature(SHAPE, False, True, True, recompute=True)
    assert describe_signature(recomputed) == (
        "M=8192 K=4096 N=1024, bfloat16, grads of weight+bias, recomputed"
    )


def test_the_start_says_how_many_and_why_not_the_others():
    screened = [
        Candidate("a", LINEAR),
        LeftOut("b", LINEAR, Reason.SMALL_KN),
        LeftOut("c", LINEAR, Reason.FILTERED_BY_NAME),
        LeftOut("d", LINEAR, Reason.SMALL_KN),
    ]
    assert start_line(screened, "rowwise") == (
        "1 of 4 Linears are candidates for rowwise; left out: 2 small kn, "
        "1 filtered by name"
    )
    assert start_line(screened[:1], "rowwise") == (
        "1 of 1 Linears are candidates for rowwise"
    )


def test_no_candidate_at_all_is_said_with_the_reasons():
    screened = [LeftOut("a", LINEAR, Reason.NOT_DIVISIBLE_BY_16)] * 2
    assert no_candidates_line(screened) == (
        "none of the 2 Linears is a candidate (2 not divisible by 16), so the model "
        "trains on in high precision"
    )


def test_a_changed_shape_names_the_fields_that_differ():
    found = Shape(17, 4096, 1024, "float32", "bfloat16", None, False)
    far = Shape(1, 1, 1, "float64", "float64", None, True)
    assert shape_change_line("wq", [far, SHAPE], found) == (
        "wq: m was 8192, is 17, input_dtype was 'bfloat16', is 'float32'"
    )


def test_a_call_that_was_not_planned_is_said():
    assert shape_change_line("", [], SHAPE) == (
        "(root) is called, which the plan has never seen"
    )


def test_a_stuck_tuning_says_what_it_waits_for():
    line = stuck_line(13, 1, 12)
    assert line.startswith(
        "13 forwards with gradients in a row, but none of their gradients came back "
        "(1 training steps so far)."
    )
    assert "12 of their results are kept and wait for a backward" in line
    assert "freeze()" in line


def test_reporting_needs_no_torch():
    code = "import sys, fp8tune.report.table; print('torch' in sys.modules)"
    run = subprocess.run(  # noqa: S603 - runs this one line
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False"
