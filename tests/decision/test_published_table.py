"""torchao's table for H100 as ground truth: the tuner must find the faster variant."""

import csv
import random
from pathlib import Path

from torch import nn

from fp8tune.config import StaticFilter, TuneConfig
from fp8tune.decision.decide import decide
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import REFERENCE, Layer, Shape, Signature
from fp8tune.model.candidates import Candidate, Sample
from fp8tune.model.screen import screen
from fp8tune.recipes import get_recipe
from fp8tune.timing.measure import measure

TABLE = Path(__file__).parents[1] / "data" / "h100_rowwise_speedup.csv"
CONFIG = TuneConfig()
ROWWISE = get_recipe("rowwise", "cpu")
NOISE = 0.02


def cells():
    """(M, K, N, speedup) of each cell."""
    with TABLE.open(newline="") as file:
        return [
            (int(row["M"]), int(row["K"]), int(name[1:]), float(row[name]))
            for row in csv.DictReader(file)
            for name in row
            if name.startswith("N")
        ]


def meta_linear(k, n):
    return nn.Linear(k, n, bias=False, device="meta")


def decided(cell, scripted_clock):
    """What becomes of a layer with the cell's shape and speedup on a noisy machine."""
    m, k, n, speedup = cell
    rng = random.Random(f"{m} {k} {n}")  # noqa: S311 - noise, no secrets

    def time_ms(_, variant):
        exact = 1.0 if variant == REFERENCE else 1.0 / speedup
        return exact * (1 + rng.gauss(0, NOISE))

    shape = Shape(m, k, n, "bfloat16", "bfloat16", None, False)
    signature = Signature(shape, grad_input=True, grad_weight=True, grad_bias=False)
    sample = Sample(signature, meta_linear(k, n), None, None)
    measurement = measure(sample, ROWWISE, scripted_clock(time_ms), CONFIG)
    layer = Layer("linear", k, n, "bfloat16", True, None, ((signature, 1),))
    (decision,) = decide([layer], [measurement], [ROWWISE.name], CONFIG)
    return decision


def allowed(speedup):
    reasons = {Reason.FASTER} if speedup > 1 else set()
    reasons |= {Reason.SLOWER} if speedup < 1 else set()
    if 0.98 <= speedup <= 1.02:
        reasons.add(Reason.NO_CLEAR_DIFFERENCE)
    return reasons


def statically_accepted():
    return [
        (m, speedup)
        for m, k, n, speedup in cells()
        if isinstance(
            screen(meta_linear(k, n), [ROWWISE], static_filter=StaticFilter.SMALL_KN)[
                0
            ],
            Candidate,
        )
    ]


def test_the_table_has_all_its_cells():
    assert len({cell[:3] for cell in cells()}) == 216


def test_every_cell_ends_in_its_faster_variant(scripted_clock):
    wrong = [
        (cell, decision.reason)
        for cell in cells()
        if (decision := decided(cell, scripted_clock)).reason not in allowed(cell[-1])
    ]
    assert wrong == []


def test_the_static_filter_accepts_slowdowns_that_the_tuner_would_not():
    accepted = statically_accepted()
    slowdowns = [(m, speedup) for m, speedup in accepted if speedup < 1]
    assert len(accepted) == 114
    assert len(slowdowns) == 45
    assert max(m for m, _ in slowdowns) == 4096
