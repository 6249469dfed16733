"""Ranks that see other data, other numbers of batches, or never come at all."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.ranks import joining as joining_of_torch
from fp8tune.ranks.group import Ranks as RanksOfGroup

if TYPE_CHECKING:
    from pathlib import Path

    from fp8tune.decision.records import Signature
    from tests.conftest import Ranks

pytestmark = pytest.mark.dist


def wide_is_faster(signature: Signature, variant: str) -> float:
    wide = signature.shape.n >= 32
    return 1.0 if (variant == "reference") == wide else 0.5


def auto_of(**options: object) -> AutoFloat8:
    from tests.conftest import ScriptedClock  # noqa: PLC0415 - in the rank's process

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    clock = ScriptedClock(wide_is_faster, lambda names: 10.0 - len(names))
    defaults = {"recipe": "bf16", "warmup_steps": 2, "clock": clock}
    return AutoFloat8(model, **(defaults | options))


def backward(model: nn.Module, rows: int = 8) -> None:
    model(torch.ones(rows, 16)).square().mean().backward()


def train_micro_batches(auto: AutoFloat8, counts: list[int]) -> None:
    """A training step per count, its gradients reduced in the last micro-batch."""
    model = DistributedDataParallel(auto)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for count in counts:
        with model.no_sync():
            for _ in range(count - 1):
                backward(model)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def train_until_data_ends(auto: AutoFloat8, batches: int) -> None:
    model = DistributedDataParallel(auto)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with Join([model]):
        for _ in range(batches):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()


def schedules(seeds: list[int]) -> list[tuple[bool, str]]:
    """For each seed: whether the steps froze it, and the plan in the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[tuple[bool, str]] = []
    for seed in seeds:
        draw = random.Random(seed)  # noqa: S311 - a schedule
        auto = auto_of(warmup_steps=draw.randint(1, 3))
        if draw.random() < 0.5:
            steps = draw.randint(4, 6)
            counts = [[draw.randint(1, 4) for _ in range(steps)] for _ in range(world)]
            train_micro_batches(auto, counts[rank])
            frozen = auto.frozen
        else:
            batches = [draw.randint(1, 8) for _ in range(world)]
            train_until_data_ends(auto, batches[rank])
            train_until_data_ends(auto, 2)  # the next epoch, which all begin
            frozen = auto.frozen or max(batches) < 4
        found.append((frozen, str(auto.freeze())))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("world", [2, 3, 4])
def test_uneven_micro_batches_and_data_that_ends_early(
    world: int, part: int, ranks: Ranks
) -> None:
    """A hundred random schedules in all: none hangs, and each ends with one plan."""
    seeds = [100 * world + 10 * part + x for x in range(9)]
    answers = ranks(world, schedules, seeds, seconds=40)
    assert set(answers) == set(range(world))
    for rank, found in answers.items():
        assert isinstance(found, list), f"rank {rank}: {found}"
        assert [frozen for frozen, _ in found] == [True] * len(seeds)
    plans = {tuple(plan for _, plan in found) for found in answers.values()}
    assert len(plans) == 1


def tells_of_join() -> object:
    model = DistributedDataParallel(nn.Linear(2, 2))
    before = joining_of_torch.joining()
    with Join([model]):
        return before, joining_of_torch.joining()


def test_join_is_seen(ranks: Ranks) -> None:
    """Fails loudly when torch moves what joining() asks."""
    assert set(ranks(2, tells_of_join).values()) == {(False, True)}


def replays(cache: str, rows: list[int]) -> object:
    auto = auto_of(cache=cache)
    replayed = str(auto.phase)
    model = DistributedDataParallel(auto)
    for _ in range(5):
        backward(model, rows[dist.get_rank()])
        model.zero_grad()
    return replayed, auto.frozen, str(auto.plan)


def test_a_replayed_plan_is_everybodys_or_nobodys(ranks: Ranks, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache.json")
    ranks(2, replays, cache, [8, 8])
    same = ranks(2, replays, cache, [8, 8])
    assert same[0] == same[1]
    assert same[0][:2] == ("replayed", True)
    other = ranks(2, replays, cache, [8, 24])
    assert other[0] == other[1]
    assert other[0][:2] == ("replayed", True)
    assert other[0][2] != same[0][2]


def lone_freeze(who: int) -> object:
    auto = auto_of(warmup_steps=5)
    model = DistributedDataParallel(auto)
    for _ in range(2):  # in the second DDP talks before it calls the model
        model.zero_grad()
        backward(model)
    if dist.get_rank() == who:
        auto.freeze()
    model.zero_grad()
    time.sleep(0.2)
    backward(model)
    return "trained on"


@pytest.mark.parametrize("who", [0, 1])
def test_freeze_on_one_rank_alone_is_refused_on_every_rank(
    who: int, ranks: Ranks
) -> None:
    answers = ranks(2, lone_freeze, who, seconds=20)
    for answer in answers.values():
        assert answer.startswith("RankMismatchError")
        assert (
            f"rank {who} called freeze() in its training step 2, while rank" in answer
        )


def freeze_everywhere() -> object:
    auto = auto_of(warmup_steps=50)
    for _ in range(3):  # ranks that do not wait for each other
        time.sleep(0.2 * dist.get_rank())
        backward(auto)
    return str(auto.freeze())


def test_freeze_on_every_rank_waits_for_the_slowest(ranks: Ranks) -> None:
    answers = ranks(2, freeze_everywhere)
    assert "converted 1 of 2 Linears" in answers[0]
    assert answers[0] == answers[1]


def in_a_group_of_others() -> object:
    group = dist.new_group([0])
    auto_of(process_group=group)
    return "built"


def test_a_group_without_this_rank_is_refused(ranks: Ranks) -> None:
    answers = ranks(2, in_a_group_of_others)
    assert answers[0] == "built"
    assert answers[1].startswith("ConfigError: process_group= is a group without")


def unlike_caches(folder: str) -> object:
    auto_of(cache=f"{folder}/cache.json" if dist.get_rank() else None)
    return "built"


def test_unlike_caches_are_named_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    for answer in ranks(2, unlike_caches, str(tmp_path)).values():
        assert "cache is 'None' on rank 0 and" in answer


def dies(phase: str, cache: str) -> object:
    """Rank 1 ends in the named phase; the others train on without DDP."""
    trial = TuneConfig(trial_steps=60 if phase == "a round of the trial" else 0)
    if dist.get_rank() == 1 and "construction" in phase:
        os._exit(9)
    auto = auto_of(cache=cache, config=trial, warmup_steps=1)
    for number in range(60):
        if dist.get_rank() == 1 and number == (8 if "trial" in phase else 1):
            os._exit(9)
        backward(auto)
        auto.zero_grad()
    return "trained on"


@pytest.mark.parametrize(
    "phase",
    [
        "the construction of AutoFloat8",
        "the end of warmup",
        "the replay of a cached plan",
        "a round of the trial",
    ],
)
def test_a_rank_that_never_comes_is_named_with_the_phase(
    phase: str, ranks: Ranks, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache.json")
    if "replay" in phase:
        ranks(3, replays_alone, cache)
    answers = ranks(3, dies, phase, cache, seconds=4, dying=1)
    assert set(answers) == {0, 2}
    for answer in answers.values():
        assert answer.startswith("RankMismatchError: fp8tune waited 4 s at")
        assert f"{phase} for rank 1 of 3, which did not come" in answer


def replays_alone(cache: str) -> object:
    auto = auto_of(cache=cache, config=TuneConfig(trial_steps=0), warmup_steps=1)
    backward(auto)
    return str(auto.freeze())


def fails_before_it_comes() -> object:
    def make() -> int:
        return 1 // (1 - dist.get_rank())

    return RanksOfGroup().meet(make, "a test")


def test_a_rank_that_fails_tells_the_others_at_once(ranks: Ranks) -> None:
    answers = ranks(2, fails_before_it_comes, seconds=40)
    assert answers[1].startswith("ZeroDivisionError")
    assert "rank 1 failed at a test: ZeroDivisionError" in answers[0]


def late_group(store: str, rank: int) -> object:
    auto = auto_of(warmup_steps=1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    backward(auto)
    backward(auto)
    return "frozen"


def rebuilt(folder: str) -> object:
    rank = dist.get_rank()
    dist.destroy_process_group()
    return late_group(f"{folder}/late", rank)


def test_a_process_group_that_comes_late_is_refused(
    ranks: Ranks, tmp_path: Path
) -> None:
    for answer in ranks(2, rebuilt, str(tmp_path)).values():
        assert "init_process_group was called after AutoFloat8" in answer
