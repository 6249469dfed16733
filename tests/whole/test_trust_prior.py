"""``trust_prior``: what other shapes make clear is skipped, and said to be expected."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, Plan, Reason, TuneConfig, plan_ahead
from tests.conftest import ScriptedClock
from tests.helpers import all_faster, all_slower

if TYPE_CHECKING:
    from pathlib import Path

    from fp8tune.decision.records import Signature
    from tests.conftest import Ranks, Script

TRUST = TuneConfig(trust_prior=True, include_output_layer=True)


def tuned(
    sizes: dict[str, int],
    script: Script,
    path: Path | str,
    config: TuneConfig = TRUST,
    rows: int = 64,
) -> tuple[Plan, set[int]]:
    """The plan of Linears with K = 64 and these N, and the N that were timed."""
    model = nn.ModuleDict({name: nn.Linear(64, n) for name, n in sizes.items()})
    model.forward = lambda *x: sum(y(*x).sum() for y in model.values())
    clock: Any = ScriptedClock(script)
    auto = AutoFloat8(
        model, recipe="bf16", config=config, cache=path, clock=clock, warmup_steps=1
    )
    auto(torch.randn(rows, 64, requires_grad=True)).backward()
    return auto.freeze(), {signature.shape.n for signature, _ in clock.timed}


def test_a_clear_layer_is_not_timed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache.json"
    _, timed = tuned({"seen": 64}, all_faster, path)
    assert timed == {64}

    caplog.set_level(logging.INFO, "fp8tune")
    plan, timed = tuned({"near": 128, "far": 2048}, all_faster, path)
    assert timed == {2048}
    near, far = plan.decisions
    assert (near.reason, far.reason) == (Reason.EXPECTED_FASTER, Reason.FASTER)
    assert near.recipe == "bf16"
    assert near.reference_ms is None
    assert near.samples == 0
    found = (near.speedup_low, near.speedup, near.speedup_high)
    assert found == pytest.approx((2 / 1.2, 2.0, 2 * 1.2))
    assert plan.converted_fqns == ["near", "far"]
    assert "1 of 2 signatures are timed; 1 are not" in caplog.text
    table = str(plan)
    assert "bf16: expected faster" in table
    assert "1 Linears were not timed; their speedups are expected, from " in table
    assert Plan.from_dict(plan.to_dict()) == plan

    # Nothing was kept as timed: the same again, and without trust it is timed.
    again, timed = tuned({"near": 128, "far": 2048}, all_faster, path)
    assert timed == set()
    assert again.decisions == plan.decisions
    _, timed = tuned(
        {"near": 128, "far": 2048},
        all_faster,
        path,
        TuneConfig(include_output_layer=True),
    )
    assert timed == {128}


def test_a_clear_loss_stays_in_high_precision(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    tuned({"seen": 64}, all_slower, path)
    plan, timed = tuned({"near": 128}, all_slower, path)
    (near,) = plan.decisions
    assert timed == set()
    assert near.reason is Reason.EXPECTED_SLOWER
    assert plan.converted_fqns == []


def gain(roles: set[str]) -> float:
    """Milliseconds that converting these saves a step: layer 1 loses."""
    return sum(-20.0 if x == "1" else 10.0 for x in roles)


def test_a_trial_overrules_what_is_expected(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    tuned({"seen": 64}, all_faster, path)
    clock: Any = ScriptedClock(all_faster, lambda roles: 100.0 - gain(roles))
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 2048)),
        recipe="bf16",
        config=replace(TRUST, trial_steps=200),
        cache=path,
        clock=clock,
        warmup_steps=1,
    )
    x = torch.randn(64, 64, requires_grad=True)
    plan = auto.trial(lambda: auto(x).sum().backward())
    assert {x.shape.n for x, _ in clock.timed} == {2048}
    assert plan.converted_fqns == ["0", "2"]
    assert plan["1"].reason is Reason.SLOWER_IN_TRAINING
    assert "1 Linears were not timed" in str(plan)


def test_what_is_not_clear_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"

    def barely(signature: Signature, variant: str) -> float:
        del signature
        return 1.0 if variant == "reference" else 0.9

    tuned({"seen": 64}, barely, path)
    _, timed = tuned({"near": 128}, barely, path)
    assert timed == {128}


def test_a_gain_is_not_trusted_where_accuracy_decides(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    tuned({"seen": 64}, all_faster, path)
    strict = TuneConfig(trust_prior=True, min_sqnr_db=20, include_output_layer=True)
    _, timed = tuned({"near": 128}, all_faster, path, strict)
    assert timed == {128}


def test_a_plan_that_is_made_ahead_trusts_too(
    tmp_path: Path, silent_clock: Any
) -> None:
    path = tmp_path / "cache.json"
    tuned({"seen": 64}, all_faster, path)
    plan = plan_ahead(
        lambda: nn.Sequential(nn.Linear(64, 128)),
        torch.zeros(64, 64, requires_grad=True),
        recipe="bf16",
        compile=False,
        cache=path,
        config=TRUST,
        clock=silent_clock,
    )
    assert [x.reason for x in plan.decisions] == [Reason.EXPECTED_FASTER]


def _rank(path: str) -> list[tuple[list[str], set[int]]]:
    found = []
    # Both ranks are near what is known; then one of them is not.
    for n, others_rows in ((128, 64), (32, 4096)):
        rows = others_rows if torch.distributed.get_rank() else 64
        plan, timed = tuned({"near": n}, all_faster, path, rows=rows)
        found.append(([str(x.reason) for x in plan.decisions], timed))
    return found


@pytest.mark.dist
def test_ranks_skip_the_same(tmp_path: Path, ranks: Ranks) -> None:
    path = tmp_path / "cache.json"
    tuned({"seen": 64}, all_faster, path)
    expected = [(["expected_faster"], set()), (["faster"], {32})]
    assert ranks(2, _rank, str(path)) == {0: expected, 1: expected}
