"""Which trial plan wins, from scripted step times."""

from __future__ import annotations

import random
from itertools import combinations
from typing import TYPE_CHECKING

import pytest

from fp8tune.trial.results import lost_ms, results_of, unclear
from fp8tune.trial.search import Role, Search, TrialPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMES = ("wq", "wk", "w1", "w2")
Names = frozenset[str]


def plan(*names: str) -> Names:
    return frozenset(names)


def short(converted: TrialPlan) -> Names:
    return frozenset(role.name.rsplit(".", 1)[1] for role in converted)


def role(name: str, gain_ms: float) -> Role:
    """Alone it gains this much in a step of 100 ms, give or take 3 ms in the step."""
    fqns = tuple(f"layers.{i}.{name}" for i in range(4))
    full = f"layers.{{}}.{name}"
    return Role(name=full, fqns=fqns, family=name[:1], gain_ms=gain_ms, spread_ms=3.0)


def roles_for(start: Names) -> list[Role]:
    return [role(x, 2.0 if x in start else -2.0) for x in NAMES]


def run(
    cost: Callable[[Names], float],
    start: Names = frozenset(),
    *,
    noise: float = 0.01,
    roles: Sequence[Role] | None = None,
    max_steps: int = 400,
    seed: int = 0,
) -> Search:
    generator = random.Random(seed)  # noqa: S311 - noise, not a secret
    every = roles or roles_for(start)
    search = Search(
        every,
        TrialPlan(x for x in every if short({x}) <= start),
        confidence=0.95,
        min_speedup=1.0,
        max_steps=max_steps,
    )
    while not search.finished:
        drift = 1 + 0.3 * generator.random()
        times = {
            x: drift * cost(short(x)) * generator.gauss(1, noise)
            for x in search.order()
        }
        search.record(times)
    return search


def gains(**each: float) -> Callable[[Names], float]:
    """Step time of 100 less what each converted role gains."""
    return lambda names: 100 - sum(each[x] for x in names)


def test_a_layer_that_is_faster_alone_and_slower_in_the_step_is_reverted() -> None:
    cost = gains(wq=5, wk=-6, w1=8, w2=8)
    assert short(run(cost, plan("wq", "wk", "w1", "w2")).best) == plan("wq", "w1", "w2")


def test_a_layer_that_loses_alone_and_wins_in_the_step_is_converted() -> None:
    cost = gains(wq=5, wk=5, w1=8, w2=8)
    assert short(run(cost, plan("wq", "w1", "w2")).best) == plan("wq", "wk", "w1", "w2")


def test_high_precision_wins_unless_something_is_clearly_faster() -> None:
    slower = run(gains(wq=-3, wk=-4, w1=-1, w2=-2), plan("wq", "w1"))
    equal = run(gains(wq=0, wk=0, w1=0, w2=0), plan("wq", "w1"))
    assert short(slower.best) == short(equal.best) == plan()


def test_never_slower_than_high_precision_whatever_the_noise() -> None:
    cost = gains(wq=-0.5, wk=0, w1=-1, w2=0.0)
    bests = [short(run(cost, plan("w1"), noise=0.1, seed=i).best) for i in range(40)]
    clearly_wrong = [x for x in bests if cost(x) > 100.4]
    # 5% of comparisons may err by the confidence asked for.
    assert len(clearly_wrong) <= 2


def test_what_makes_no_difference_is_not_called_slower() -> None:
    cost = gains(wq=10, wk=0, w1=0, w2=-20)
    ended = run(cost, plan("wq", "wk", "w1", "w2"), noise=0.02)
    assert plan("wq") <= short(ended.best) <= plan("wq", "wk", "w1")
    assert short(unclear(ended, ended.best)) == plan("wk", "w1") - short(ended.best)


def test_what_is_clearly_slower_is_not_called_unclear() -> None:
    ended = run(gains(wq=10, wk=-5, w1=8, w2=-6), plan("wq", "w1"))
    assert short(ended.best) == plan("wq", "w1")
    assert unclear(ended, ended.best) == plan()


@pytest.mark.parametrize("start", [(), NAMES, ("wq", "w1")])
def test_the_best_of_all_plans_is_found(start: tuple[str, ...]) -> None:
    """Also where two roles win only together, as siblings share their input's cast."""

    def cost(names: Names) -> float:
        together = 9 if {"wq", "wk"} <= names else -4 * len(names & {"wq", "wk"})
        return (
            100 - together - (6 if "w1" in names else 0) + (5 if "w2" in names else 0)
        )

    found = short(run(cost, plan(*start)).best)
    every = [plan(*x) for n in range(5) for x in combinations(NAMES, n)]
    best = min(every, key=cost)
    assert found == best == plan("wq", "wk", "w1")


MANY = (*(f"x{i}" for i in range(3)), *(f"y{i}" for i in range(15)))


def shared_cast(names: Names) -> float:
    """All three of x lose 1 each, and gain 3 for each but the first; each of y loses 5."""
    siblings = sum(x.startswith("x") for x in names)
    return 100 + siblings - 3 * max(siblings - 1, 0) + 5 * (len(names) - siblings)


@pytest.mark.parametrize("seed", range(2))
def test_siblings_that_gain_only_together_are_found(seed: int) -> None:
    """Of so many roles that no two are tried together unless they are siblings."""
    roles = [role(x, -1.0 if x.startswith("x") else -5.0) for x in MANY]
    search = run(shared_cast, roles=roles, noise=0.003, seed=seed)
    assert short(search.best) == {"x0", "x1", "x2"}


def test_the_number_of_steps_is_bounded() -> None:
    for most in (30, 100, 200):
        search = run(gains(wq=1, wk=1, w1=1, w2=1), noise=0.2, max_steps=most)
        assert search.steps <= most


@pytest.mark.parametrize("rounds", [3, 10, 17])
def test_a_budget_of_whole_rounds_is_spent_to_the_last_step(rounds: int) -> None:
    """And a step less than a round is left, never taken."""
    one = [role("w1", 0.0)]  # two plans a round
    spent = [
        run(gains(w1=0), noise=0.3, roles=one, max_steps=2 * rounds + spare).steps
        for spare in (0, 1)
    ]
    assert spent == [2 * rounds, 2 * rounds]


def test_too_few_steps_for_a_verdict_leave_what_layers_measured_alone() -> None:
    good, bad = gains(wq=5, wk=5, w1=5, w2=5), gains(wq=-5, wk=-5, w1=-5, w2=-5)
    for most in (2, 8, 16):
        assert short(run(good, plan("wq", "w1"), max_steps=most).best) == plan(
            "wq", "w1"
        )
    assert short(run(bad, plan("wq", "w1"), max_steps=30).best) == plan()


def test_clearly_beaten_plans_leave_the_field_early() -> None:
    wide = run(gains(wq=20, wk=-20, w1=20, w2=-20), plan("wq", "w1"))
    assert short(wide.best) == plan("wq", "w1")
    assert wide.steps < 60


def test_first_come_nothing_everything_and_the_plan_of_layers_alone() -> None:
    roles = [role(f"w{i}", 0.0) for i in range(12)]
    start = frozenset(roles[:3])
    search = Search(roles, start, confidence=0.95, min_speedup=1.0, max_steps=400)
    assert set(search.order()) == {frozenset(), frozenset(roles), start}


def test_at_most_five_plans_run_at_a_time() -> None:
    """Four, and one more where the leader comes back from those that left."""
    roles = [role(f"w{i}", 0.0) for i in range(12)]
    search = Search(roles, frozenset(roles[:6]))
    random_ = random.Random(0)  # noqa: S311
    while not search.finished:
        order = search.order()
        assert len(order) == len(set(order)) <= 5
        search.record({x: random_.gauss(100 - len(x), 3) for x in order})


def test_every_rank_chooses_the_same_whatever_the_order_of_its_roles() -> None:
    roles = roles_for(plan("wq"))
    chosen = [
        run(gains(wq=5, wk=-1, w1=3, w2=0), plan("wq"), roles=order, noise=0.0)
        for order in (roles, roles[::-1])
    ]
    assert chosen[0].best == chosen[1].best
    assert results_of(chosen[0], {}) == results_of(chosen[1], {})


def test_results_tell_every_plan_against_high_precision() -> None:
    search = run(gains(wq=20, wk=-20, w1=20, w2=-20), plan("wq", "w1"))
    results = {x.converted: x for x in results_of(search, {})}
    assert results[()].speedup == pytest.approx(1.0)
    best = results["layers.{}.w1", "layers.{}.wq"]
    assert best.speedup == pytest.approx(100 / 60, rel=0.02)
    assert best.layers == 8
    assert best.speedup_low < best.speedup < best.speedup_high
    assert lost_ms(search) > 0
