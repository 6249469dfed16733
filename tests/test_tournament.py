"""Which trial plan wins, from scripted step times."""

from __future__ import annotations

import random
from itertools import combinations
from typing import TYPE_CHECKING

import pytest

from fp8tune.tournament import Role, Tournament, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NAMES = ("wq", "wk", "w1", "w2")


def role(name: str, layers: int = 4, distance: float = 1.5) -> Role:
    fqns = tuple(f"layers.{i}.{name}" for i in range(layers))
    return Role(f"layers.{{}}.{name}", fqns, distance)


ROLES = [role(name) for name in NAMES]


def plan(*names: str) -> TrialPlan:
    return frozenset(x for x in ROLES if x.name.rsplit(".", 1)[1] in names)


def run(
    cost: Callable[[set[str]], float],
    start: TrialPlan = frozenset(),
    *,
    noise: float = 0.01,
    roles: Iterable[Role] = ROLES,
    max_steps: int = 400,
    seed: int = 0,
) -> Tournament:
    generator = random.Random(seed)  # noqa: S311 - noise, not a secret
    tournament = Tournament(
        list(roles), start, confidence=0.95, min_speedup=1.0, max_steps=max_steps
    )
    while not tournament.finished:
        drift = 1 + 0.3 * generator.random()
        times = {
            x: drift
            * cost({y.name.rsplit(".", 1)[1] for y in x})
            * generator.gauss(1, noise)
            for x in tournament.order()
        }
        tournament.record(times)
    return tournament


def gains(**each: float) -> Callable[[set[str]], float]:
    """Step time of 100 less what each converted role gains."""
    return lambda names: 100 - sum(each[x] for x in names)


def test_a_layer_that_is_faster_alone_and_slower_in_the_step_is_reverted() -> None:
    cost = gains(wq=5, wk=-6, w1=8, w2=8)
    assert run(cost, plan("wq", "wk", "w1", "w2")).best == plan("wq", "w1", "w2")


def test_a_layer_that_loses_alone_and_wins_in_the_step_is_converted() -> None:
    cost = gains(wq=5, wk=5, w1=8, w2=8)
    assert run(cost, plan("wq", "w1", "w2")).best == plan("wq", "wk", "w1", "w2")


def test_high_precision_wins_unless_something_is_clearly_faster() -> None:
    slower = run(gains(wq=-3, wk=-4, w1=-1, w2=-2), plan("wq", "w1"))
    equal = run(gains(wq=0, wk=0, w1=0, w2=0), plan("wq", "w1"))
    assert slower.best == equal.best == plan()


def test_never_slower_than_high_precision_whatever_the_noise() -> None:
    cost = gains(wq=-0.5, wk=0, w1=-1, w2=0.0)
    bests = [run(cost, plan("w1"), noise=0.1, seed=i).best for i in range(40)]
    clearly_wrong = [x for x in bests if cost({r.name[-2:] for r in x}) > 100.4]
    # 5% of comparisons may err by the confidence asked for.
    assert len(clearly_wrong) <= 2


def test_among_equal_plans_the_one_with_fewer_layers_wins() -> None:
    cost = gains(wq=10, wk=0, w1=0, w2=-20)
    ended = run(cost, plan("wq", "wk", "w1", "w2"), noise=0.02)
    assert ended.best == plan("wq")
    assert ended.unclear == plan("wk", "w1")


def test_what_is_clearly_slower_is_not_called_unclear() -> None:
    ended = run(gains(wq=10, wk=-5, w1=8, w2=-6), plan("wq", "w1"))
    assert ended.best == plan("wq", "w1")
    assert ended.unclear == plan()


@pytest.mark.parametrize("start", [(), NAMES, ("wq", "w1")])
def test_the_best_of_all_plans_is_found(start: tuple[str, ...]) -> None:
    """Also where two roles win only together, as siblings share their input's cast."""

    def cost(names: set[str]) -> float:
        together = 9 if {"wq", "wk"} <= names else -4 * len(names & {"wq", "wk"})
        return (
            100 - together - (6 if "w1" in names else 0) + (5 if "w2" in names else 0)
        )

    found = run(cost, plan(*start)).best
    every = [plan(*x) for n in range(5) for x in combinations(NAMES, n)]
    best = min(every, key=lambda x: cost({r.name[-2:] for r in x}))
    assert found == best == plan("wq", "wk", "w1")


def test_the_number_of_steps_is_bounded() -> None:
    for most in (30, 100, 200):
        tournament = run(gains(wq=1, wk=1, w1=1, w2=1), noise=0.2, max_steps=most)
        assert tournament.steps <= most


def test_too_few_steps_for_a_verdict_leave_high_precision() -> None:
    assert run(gains(wq=50, wk=0, w1=0, w2=0), max_steps=30).best == plan()


def test_clearly_beaten_plans_leave_the_field_early() -> None:
    wide = run(gains(wq=20, wk=-20, w1=20, w2=-20), plan("wq", "w1"))
    assert wide.steps < 8 * (2 + 16)


def test_at_most_eight_plans_run_at_a_time() -> None:
    roles = [role(f"w{i}", distance=1 + i / 10) for i in range(12)]
    tournament = Tournament(
        roles, frozenset(), confidence=0.95, min_speedup=1.0, max_steps=400
    )
    order = tournament.order()
    # All reference, all candidates, then the flips nearest to the threshold.
    flips = [frozenset({x}) for x in roles[:6]]
    assert len(order) == 8
    assert set(order) == {frozenset(), frozenset(roles), *flips}


def test_results_tell_every_plan_against_high_precision() -> None:
    tournament = run(gains(wq=20, wk=-20, w1=20, w2=-20), plan("wq", "w1"))
    results = {x.converted: x for x in tournament.results({})}
    assert results[()].speedup == pytest.approx(1.0)
    best = results["layers.{}.w1", "layers.{}.wq"]
    assert best.speedup == pytest.approx(100 / 60, rel=0.02)
    assert best.layers == 8
    assert best.speedup_low < best.speedup < best.speedup_high
    assert tournament.lost_ms > 0
