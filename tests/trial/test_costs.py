"""What a search does with more than the device's time of a step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from fp8tune.trial.results import results_of
from fp8tune.trial.search import Role, Search, TrialPlan
from fp8tune.trial.sizes import Timed, of_one_size

ROLES = [Role(name=f"w{i}", fqns=(f"w{i}",), gain_ms=5.0) for i in range(4)]
ALL = TrialPlan(ROLES)
Script = Callable[[TrialPlan, random.Random], Timed]


def new(**options: float) -> Search:
    return Search(ROLES, ALL, **options)


def go(search: Search, script: Script, most: int = 1000) -> Search:
    random_ = random.Random(0)  # noqa: S311
    while not search.finished and search.steps < most:
        search.record({x: script(x, random_) for x in search.order()})
    return search


def faster(plan: TrialPlan, random_: random.Random) -> Timed:
    ms = (100 - 5 * len(plan)) * random_.gauss(1, 0.01)
    return Timed(ms, 1.0, ms, ms / 1e3)


def test_a_plan_that_makes_the_loop_slower_does_not_win() -> None:
    """Less time on the device, more launches: 1.25x by the span, 0.9x by the wall."""

    def bound_by_the_cpu(plan: TrialPlan, random_: random.Random) -> Timed:
        step = faster(plan, random_)
        return step._replace(wall_ms=(150 + 4 * len(plan)) * random_.gauss(1, 0.01))

    ended = go(new(), bound_by_the_cpu)
    assert ended.best == TrialPlan()
    assert ended.seen.bound_elsewhere


def test_a_loop_that_waits_for_data_is_said_to_and_still_takes_the_faster_plan() -> (
    None
):
    def waits(plan: TrialPlan, random_: random.Random) -> Timed:
        return faster(plan, random_)._replace(wall_ms=300 * random_.gauss(1, 0.001))

    ended = go(new(), waits)
    assert ended.best == ALL
    assert ended.seen.bound_elsewhere


def test_a_loop_that_is_as_much_shorter_as_the_device_is_not_warned_about() -> None:
    assert not go(new(), faster).seen.bound_elsewhere


def test_ragged_batches_are_compared_per_unit_of_work() -> None:
    """30 to 50 rows, so that steps differ by 60%; the true gain is 15%."""

    def ragged(plan: TrialPlan, random_: random.Random) -> Timed:
        rows = random_.randint(30, 50)
        ms = (20 + 2 * rows) * (0.85 if plan == ALL else 1.0)
        return Timed(ms * random_.gauss(1, 0.01), rows)

    assert go(new(), ragged).best == ALL
    blind = go(new(), lambda *x: ragged(*x)._replace(size=0.0), most=60)
    ragged_too = go(new(), ragged, most=60)
    width = [x.speedup_high - x.speedup_low for x in (
        next(r for r in results_of(blind, {}) if r.layers == 4),
        next(r for r in results_of(ragged_too, {}) if r.layers == 4),
    )]  # fmt: skip
    assert width[1] < width[0] / 2


def test_steps_that_cannot_tell_their_size_are_taken_as_they_are() -> None:
    rows = [
        {0: Timed(ms, size)} for ms, size in ((10.0, 10.0), (20.0, 20.0), (5.0, 0.0))
    ]
    assert of_one_size(rows) == [{0: 10.0}, {0: 20.0}, {0: 5.0}]


def test_compiling_spends_the_budget_and_the_number_of_plans_follows() -> None:
    def compiles() -> Script:
        seen: set[TrialPlan] = set()

        def script(plan: TrialPlan, random_: random.Random) -> Timed:
            ms = (100 - 5 * len(plan) + 12 * (plan == ALL)) * random_.gauss(1, 0.01)
            first = plan not in seen
            seen.add(plan)
            return Timed(ms, 1.0, ms, ms / 1e3 + 100.0 * first)

        return script

    short, long = go(new(max_seconds=300), compiles()), go(new(), compiles())
    assert 99 < short.seen.compile_s < 101
    assert len(short.seen.tried) == 2 < len(long.seen.tried)


def test_a_search_goes_on_where_another_run_stopped() -> None:
    half = go(new(), faster, most=12)
    state = json.loads(json.dumps(half.state_dict()))
    other = new()
    assert other.load_state_dict(state)
    assert other.steps == half.steps
    assert set(other.order()) == set(half.order())
    assert go(other, faster).best == ALL
    assert not Search(ROLES[:2], ALL).load_state_dict(state)
