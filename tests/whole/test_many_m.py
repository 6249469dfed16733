"""M is a range, not a key: experts, padding and packing, with a scripted clock."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, OnShapeChange, PlanMismatchError, TuneConfig
from fp8tune.decision.kinds import kind_of
from fp8tune.trial.roles import roles_of
from tests.helpers import all_faster

if TYPE_CHECKING:
    from pathlib import Path

    from fp8tune.decision.records import Signature

EVERY = TuneConfig(static_filter="divisible", include_output_layer=True)
TOKENS = 20_000


class Experts(nn.Module):
    """Routes each token to one of several MLPs, at random."""

    def __init__(self, experts: int = 32, width: int = 32) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        route = torch.randint(len(self.experts), (len(x),))
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (route == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]))
        return x + out


def mixture(seed: int, clock: object, path: Path, **options: object) -> AutoFloat8:
    torch.manual_seed(seed)
    auto = AutoFloat8(
        Experts(), recipe="bf16", config=EVERY, clock=clock, cache=path, **options
    )
    for _ in range(5):
        auto(torch.randn(TOKENS, 32)).sum().backward()
    return auto


def timed_by_kind(clock: object) -> list[int]:
    """How many M of each kind were timed."""
    timed = {signature for signature, _ in clock.timed}
    return list(Counter(map(kind_of, timed)).values())


def test_a_mixture_of_experts_times_few_m_once(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    path = tmp_path / "cache.json"
    clock = scripted_clock(all_faster)
    first = mixture(0, clock, path)
    assert len(first.plan.decisions) == 64
    assert timed_by_kind(clock) == [4, 4]
    assert len(first.plan.converted_fqns) == 64
    size = path.stat().st_size

    for seed in (1, 2):
        again = mixture(seed, silent_clock, path)
        assert again.phase == "frozen"
        assert again.plan == first.plan
    assert path.stat().st_size == size


def test_the_table_says_what_was_timed(tmp_path: Path, scripted_clock: type) -> None:
    plan = mixture(0, scripted_clock(all_faster), tmp_path / "cache.json").plan
    sizes = sorted({x.shape.m for x, _ in plan["experts.0.0"].signatures})
    low, high = sizes[0], sizes[-1]
    text = str(plan)
    assert text.count(f"{low}..{high} ") == 2  # one row for each of two kinds
    said = f"experts.{{0..31}}.0: M {low}..{high}, {len(sizes)} sizes, 4 timed"
    assert said in text
    assert "speedups at the other sizes are interpolated" in text


def padded(
    rows: list[int], clock: object, path: Path | None, **changes: object
) -> AutoFloat8:
    config = TuneConfig(static_filter="divisible", **changes)
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(32, 64)),
        recipe="bf16",
        warmup_steps=len(rows),
        config=config,
        clock=clock,
        cache=path,
    )
    for m in [*rows, rows[0]]:
        auto(torch.randn(m, 32)).sum().backward()
    return auto


SIZES = [12, 100, 200, 300, 400, 500, 600, 700, 812]


def gains_above_256(signature: Signature, variant: str) -> float:
    m = signature.shape.m
    return m if variant == "reference" else (m / 2 if m > 256 else m * 2)


def test_a_layer_is_judged_over_all_its_calls_by_work(scripted_clock: type) -> None:
    auto = padded(SIZES, scripted_clock(gains_above_256), None)
    decision = auto.plan["0"]
    # 12 has less than a hundredth of the work.
    assert decision.timed_m == (100, 300, 500, 812)
    # From 300 on times halve, below they double; at 200 the line over log M stands at
    # 0.5 + 1.5 * log(2) / log(3).
    candidate = 12 / 0.5 + 100 / 0.5 + 200 / 1.4464 + 3312 / 2
    assert decision.speedup == pytest.approx(sum(SIZES) / candidate, rel=1e-3)
    assert decision.recipe == "bf16"
    assert len(decision.signatures) == len(SIZES)


@pytest.mark.parametrize("rows", [[50, 450, 811], [9, 1000]])
def test_other_m_inside_the_range_hit(
    rows: list[int], tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    path = tmp_path / "cache.json"
    padded(SIZES, scripted_clock(all_faster), path)
    assert padded(rows, silent_clock, path).phase == "frozen"


def test_m_outside_the_range_is_another_shape(
    tmp_path: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    path = tmp_path / "cache.json"
    padded(SIZES, scripted_clock(all_faster), path)
    with pytest.raises(PlanMismatchError, match="0: m was 12 to 812, is 5000"):
        padded([5000], None, path, on_shape_change=OnShapeChange.RAISE)
    clock = scripted_clock(all_faster)
    padded([5000, 400, 5000, 600], clock, path).freeze()
    assert "m was 12 to 812, is 5000; tuning again" in caplog.text
    # 400 and 600 lie between timed M.
    assert {signature.shape.m for signature, _ in clock.timed} == {5000}


def test_one_m_stays_a_key(tmp_path: Path, scripted_clock: type) -> None:
    path = tmp_path / "cache.json"
    padded([64, 64], scripted_clock(all_faster), path)
    clock = scripted_clock(all_faster)
    padded([65, 65], clock, path).freeze()
    assert {signature.shape.m for signature, _ in clock.timed} == {65}


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise", "bf16"])
def test_a_batch_without_rows_trains_on(recipe: str, scripted_clock: type) -> None:
    dtype = torch.float32 if recipe == "bf16" else torch.bfloat16
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).to(dtype)
    auto = AutoFloat8(
        model, recipe=recipe, config=EVERY, clock=scripted_clock(all_faster)
    )
    for rows in (8, 0, 8, 8, 8, 0, 8):
        auto(torch.zeros(rows, 32, dtype=dtype)).sum().backward()
    assert auto.frozen
    assert auto.plan.converted_fqns == ["0", "2"]
    assert {x.shape.m for x, _ in auto.plan["0"].signatures} == {8}


def test_few_tensors_are_kept(scripted_clock: type) -> None:
    auto = AutoFloat8(
        nn.Sequential(nn.Linear(32, 64)),
        recipe="bf16",
        warmup_steps=40,
        config=EVERY,
        clock=scripted_clock(all_faster),
    )
    for m in range(60, 20, -1):
        auto(torch.randn(m, 32)).sum().backward()
    capture = auto._tuner._pipeline.capture
    held = [
        x.nbytes
        for by_m in capture._tensors._inputs._by_m.values()
        for x in by_m.values()
    ]
    assert sum(held) == (60 + 59 + 58 + 57) * 32 * 4
    (called, *_) = [x for x, _ in capture.calls("0")]
    sample = capture.sample(called)
    assert sample.input is not None
    assert sample.input.shape == (called.shape.m, 32)
    assert sample.grad_output is not None


def test_a_trial_has_one_role_for_each_kind_of_expert(
    tmp_path: Path, scripted_clock: type
) -> None:
    plan = mixture(0, scripted_clock(all_faster), tmp_path / "cache.json").plan
    roles = roles_of(plan.decisions, steps=3)
    assert [len(role.fqns) for role in roles] == [32, 32]
    # 32 experts, each called once a step, save half a millisecond a call.
    assert [role.gain_ms for role in roles] == pytest.approx([16.0, 16.0], rel=1e-3)
