"""Roles from decisions, and decisions from a trial."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fp8tune.decision.decisions import after_trial
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Shape, Signature, Verdict
from fp8tune.decision.trials import TrialRecord
from fp8tune.plan.plan import Plan
from fp8tune.trial.roles import roles_of, start_of

CALL = Signature(
    Shape(64, 32, 32, "float32", "float32", None, bias=False),
    grad_input=True,
    grad_weight=True,
    grad_bias=False,
)


def decision(fqn: str, speedup: float = 2.0, calls: int = 6) -> Decision:
    faster = speedup > 1
    return Decision(
        fqn,
        32,
        32,
        Verdict.CONVERTED if faster else Verdict.REFERENCE,
        Reason.FASTER if faster else Reason.SLOWER,
        recipe="bf16" if faster else None,
        signatures=((CALL, calls),),
        reference_ms=1.0,
        candidate_ms=1.0 / speedup,
        speedup=speedup,
        speedup_low=0.9 * speedup,
        speedup_high=1.1 * speedup,
        nearest="bf16",
    )


def test_a_role_gains_what_its_layers_gain_in_a_step() -> None:
    """Two layers, three steps, two calls a step each, of which each gains half a ms."""
    (role,) = roles_of([decision("layers.0.wq"), decision("layers.1.wq")], 3)
    assert role.name == "layers.{}.wq"
    assert role.fqns == ("layers.0.wq", "layers.1.wq")
    assert role.gain_ms == pytest.approx(2.0)


def test_the_spread_grows_with_the_interval_and_with_the_layers_own_time() -> None:
    narrow = decision("a")
    wide = replace(narrow, speedup_low=1.0, speedup_high=4.0)
    unbounded = replace(narrow, speedup_low=0.0, speedup_high=None)
    spreads = [roles_of([x], 3)[0].spread_ms for x in (narrow, wide, unbounded)]
    assert spreads == sorted(spreads)
    assert spreads[0] > 0
    assert roles_of([replace(narrow, reference_ms=2.0)], 3)[0].spread_ms > spreads[0]


def test_siblings_are_children_of_one_module_that_take_k_numbers() -> None:
    decisions = [decision(f"layers.0.{x}") for x in ("att.wq", "att.wk", "ffn.w1")]
    wq, wk, w1 = roles_of(decisions, 1)
    assert wq.family == wk.family != w1.family


def test_the_search_starts_with_what_was_faster_alone() -> None:
    decisions = [decision("a.w"), decision("b.w", speedup=0.5)]
    assert {x.name for x in start_of(decisions, roles_of(decisions, 1))} == {"a.w"}


def test_only_what_was_compared_is_called_slower_in_training() -> None:
    decisions = (decision("a"), decision("b"), decision("c"), decision("d", 0.5))
    plan = Plan(decisions, "bf16", "float32", False, "compiled", ())
    trial = TrialRecord(converted=("a", "d"), unclear=("b",), results=())
    assert [x.reason for x in after_trial(plan, trial).decisions] == [
        Reason.FASTER,
        Reason.UNCLEAR_IN_TRAINING,
        Reason.SLOWER_IN_TRAINING,
        Reason.FASTER_IN_TRAINING,
    ]


def test_what_was_not_timed_saves_as_much_as_its_size_and_speedup_say() -> None:
    timed = decision("a", calls=3)
    larger = replace(CALL, shape=replace(CALL.shape, n=64))
    expected = replace(
        decision("b", calls=3),
        reason=Reason.EXPECTED_FASTER,
        signatures=((larger, 3),),
        reference_ms=None,
        candidate_ms=None,
    )
    assert [x.gain_ms for x in roles_of([timed, expected], 3)] == pytest.approx(
        [0.5, 1]
    )
    assert roles_of([expected], 3) == []
