"""The search on steps whose true times are known; bounds are those that it promises."""

from __future__ import annotations

from statistics import mean

import pytest

from tests.trial.landscapes import Ended, fused_block, landscape, run

SEEDS, FEW_SEEDS = range(40), range(24)


def ended(noise: float, seeds: range = SEEDS) -> list[Ended]:
    return [run(landscape(seed), noise, seed) for seed in seeds]


def part(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_quiet_steps_find_the_best_plan_after_few(noise: float) -> None:
    found = ended(noise)
    assert p95([x.regret for x in found]) <= 0.005
    assert mean(x.plans for x in found) <= 8
    assert mean(x.steps for x in found) <= 150
    assert part([x.over_reference > 0.003 for x in found]) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.03, 0.08])
def test_noisy_steps_seldom_end_worse_than_they_began(noise: float) -> None:
    found = ended(noise, FEW_SEEDS)
    assert mean(x.regret for x in found) <= 0.005
    assert part([x.over_start > 0.005 for x in found]) <= 0.05
    assert part([x.over_reference > 0.003 for x in found]) <= 0.01


def test_layers_that_mislead_twice_as_much_cost_more_plans_and_steps() -> None:
    found = [run(landscape(seed, error=2.0), 0.01, seed) for seed in range(12)]
    assert p95([x.regret for x in found]) <= 0.01
    assert mean(x.plans for x in found) <= 10


def test_a_cliff_is_gone_round() -> None:
    """One role costs 2% unless another is converted too."""
    found = [run(landscape(seed, cliff=True), 0.01, seed) for seed in range(12)]
    assert max(x.regret for x in found) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("error", [1.6, 4.0])
@pytest.mark.parametrize(("noise", "most"), [(0.03, 0.005), (0.08, 0.02)])
def test_layers_that_all_lose_alone_are_found_to_gain_together(
    error: float, noise: float, most: float
) -> None:
    found = [run(fused_block(error), noise, seed) for seed in range(12)]
    assert mean(x.regret for x in found) <= most
    assert max(x.over_reference for x in found) <= 0


def test_the_same_steps_give_the_same_plan() -> None:
    assert run(landscape(3), 0.03, 3) == run(landscape(3), 0.03, 3)
