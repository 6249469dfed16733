"""A second run with the same model, batch and environment tunes nothing."""

from __future__ import annotations

import gc
import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, OnShapeChange, PlanMismatchError, TuneConfig
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from pathlib import Path

    from fp8tune.decision.records import Signature


def big_is_faster(signature: Signature, variant: str) -> float:
    big = signature.shape.m * signature.shape.n >= 8 * 32
    return 1.0 if (variant == "reference") == big else 0.5


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)


def step(auto: nn.Module, rows: int = 8) -> None:
    dtype = next(auto.parameters()).dtype
    auto(torch.randn(rows, 16, dtype=dtype)).square().mean().backward()


@pytest.fixture
def cache(tmp_path: Path, scripted_clock: type) -> Path:
    path = tmp_path / "fp8tune.json"
    first_run(path, scripted_clock(big_is_faster))
    return path


def first_run(path: Path, clock: object) -> AutoFloat8:
    auto = AutoFloat8(model(), recipe="bf16", warmup_steps=1, cache=path, clock=clock)
    step(auto)
    auto.freeze()
    return auto


def test_the_second_run_is_frozen_at_once_and_times_nothing(
    cache: Path, silent_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    auto = AutoFloat8(model(), recipe="bf16", cache=cache, clock=silent_clock)
    assert auto.frozen
    assert auto.plan.converted_fqns == ["0"]
    assert "plan from the cache" in caplog.text
    assert [type(auto.module[i]) for i in (0, 2)] == [BFloat16Linear, nn.Linear]
    for _ in range(3):
        step(auto)
    assert auto.phase == "frozen"
    assert silent_clock.timed == {}


def test_a_hit_keeps_no_tensors_of_training(
    cache: Path, scripted_clock: type, silent_clock: object
) -> None:
    """Only shapes are looked at; while layers are tuned, their inputs are kept."""

    def kept_after_a_step(auto: AutoFloat8) -> int:
        step(auto)
        auto.zero_grad()
        gc.collect()
        shapes = [x.shape for x in gc.get_objects() if type(x) is torch.Tensor]
        return sum(x in ((8, 16), (8, 32)) for x in shapes)

    options = {"recipe": "bf16", "warmup_steps": 2}
    before = kept_after_a_step(nn.Sequential(nn.Linear(16, 2)))
    tuned = AutoFloat8(model(), clock=scripted_clock(big_is_faster), **options)
    assert kept_after_a_step(tuned) > before
    del tuned
    replayed = AutoFloat8(model(), cache=cache, clock=silent_clock, **options)
    assert replayed.phase == "replayed"
    assert kept_after_a_step(replayed) == before


def test_the_cached_plan_equals_the_measured_one(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    path = tmp_path / "fp8tune.json"
    measured = first_run(path, scripted_clock(big_is_faster)).plan
    again = AutoFloat8(model(), recipe="bf16", cache=path, clock=silent_clock).plan
    assert again == measured


@pytest.mark.parametrize("compile", [False, {"backend": "eager"}])
def test_the_replayed_model_is_compiled_after_its_first_step(
    cache: Path, scripted_clock: type, *, compile: object
) -> None:
    # Timing differs with compile, so this run tunes once more into the same file.
    clock = scripted_clock(big_is_faster)
    options = {
        "recipe": "bf16",
        "warmup_steps": 1,
        "cache": cache,
        "compile": compile,
        "config": TuneConfig(trial_steps=0),
    }
    tuned = AutoFloat8(model(), clock=clock, **options)
    for _ in range(2):
        step(tuned)
    auto = AutoFloat8(model(), clock=clock, **options)
    assert auto.phase == "replayed"
    step(auto)
    assert auto.module._compiled_call_impl is None
    step(auto)
    assert auto.phase == "frozen"
    assert (auto.module._compiled_call_impl is not None) == bool(compile)


def test_the_next_run_starts_with_the_winner_of_the_trial(
    tmp_path: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    # Alone both gain; in the step the second costs more than it gains.
    clock = scripted_clock(
        lambda _, variant: 1.0 if variant == "reference" else 0.5,
        lambda names: 10.0 - 2 * ("0" in names) + 3 * ("2" in names),
    )
    path = tmp_path / "fp8tune.json"
    options = {"recipe": "bf16", "warmup_steps": 1, "cache": path, "clock": clock}
    config = TuneConfig(trial_steps=200)
    first = AutoFloat8(model(), config=config, **options)
    first.trial(lambda: (step(first), first.zero_grad()))
    assert first.plan.converted_fqns == ["0"]
    again = AutoFloat8(model(), config=config, **options)
    assert again.frozen
    assert again.plan == first.plan
    without = AutoFloat8(model(), config=TuneConfig(trial_steps=0), **options)
    assert without.plan.converted_fqns == ["0", "2"]


def test_timings_without_a_trial_are_not_timed_again_but_tried(
    cache: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    clock = scripted_clock(big_is_faster, lambda names: 10.0 - len(names))
    auto = AutoFloat8(
        model(),
        recipe="bf16",
        warmup_steps=1,
        cache=cache,
        clock=clock,
        config=TuneConfig(trial_steps=200),
    )
    assert not auto.frozen
    assert "no trial of whole plans yet" in caplog.text
    auto.trial(lambda: (step(auto), auto.zero_grad()))
    assert clock.timed == {}
    assert auto.plan.converted_fqns == ["0", "2"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"recipe": "rowwise"}, "recipe was 'bf16', is 'rowwise'"),
        ({"compile": True}, "timing was 'eager', is 'compiled'"),
        ({"filter_fqns": ["2"]}, "2.reason was None, is 'filtered_by_name'"),
    ],
)
def test_another_recipe_timing_or_filter_misses_and_is_named(
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    other: dict[str, object],
    named: str,
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    config = TuneConfig(static_filter="divisible")
    options = {"recipe": "bf16", "config": config} | other
    auto = AutoFloat8(model(), cache=cache, **options)
    assert not auto.frozen
    assert named in caplog.text


def test_another_dtype_misses_and_is_named(
    cache: Path, caplog: pytest.LogCaptureFixture, scripted_clock: type
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    config = TuneConfig(static_filter="divisible")
    clock = scripted_clock(big_is_faster)
    options = {"config": config, "cache": cache, "clock": clock, "warmup_steps": 1}
    first = AutoFloat8(model(), recipe="rowwise", **options)
    step(first)
    first.freeze()
    auto = AutoFloat8(model(torch.bfloat16), recipe="rowwise", **options)
    assert not auto.frozen
    assert "0.weight_dtype was 'float32', is 'bfloat16'" in caplog.text


def test_another_environment_misses_and_is_named(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert not AutoFloat8(model(), recipe="bf16", cache=cache).frozen
    assert "torch was '" in caplog.text
    assert "is '9.9.9'" in caplog.text


def test_another_batch_size_tunes_again_and_is_named(
    cache: Path, caplog: pytest.LogCaptureFixture, scripted_clock: type
) -> None:
    caplog.set_level(logging.INFO, "fp8tune")
    clock = scripted_clock(big_is_faster)
    auto = AutoFloat8(model(), recipe="bf16", warmup_steps=1, cache=cache, clock=clock)
    assert auto.frozen
    step(auto, rows=24)
    step(auto, rows=24)
    assert auto.phase == "warmup"
    assert "0: m was 8, is 24; tuning again" in caplog.text
    step(auto, rows=24)
    assert auto.plan.converted_fqns == ["0", "2"]
    assert {x.shape.m for x, _ in clock.timed} == {24}


def test_another_batch_size_can_warn_or_raise(
    cache: Path, caplog: pytest.LogCaptureFixture, silent_clock: object
) -> None:
    def run(on_shape_change: OnShapeChange) -> AutoFloat8:
        config = TuneConfig(on_shape_change=on_shape_change)
        auto = AutoFloat8(
            model(), recipe="bf16", cache=cache, clock=silent_clock, config=config
        )
        step(auto, rows=24)
        step(auto, rows=24)
        return auto

    assert run(OnShapeChange.WARN).plan.converted_fqns == ["0"]
    assert "m was 8, is 24; the cached plan is kept" in caplog.text
    with pytest.raises(PlanMismatchError, match="m was 8, is 24"):
        run(OnShapeChange.RAISE)


def test_a_signature_in_the_cache_is_not_timed_for_another_model(
    cache: Path, scripted_clock: type
) -> None:
    clock = scripted_clock(big_is_faster)
    other = nn.Sequential(*model(), nn.ReLU(), nn.Linear(16, 32), nn.Linear(32, 64))
    auto = AutoFloat8(other, recipe="bf16", warmup_steps=1, cache=cache, clock=clock)
    step(auto)
    auto.freeze()
    # 0 and 2 are in the file; 4 differs from 0 in that its input needs a gradient.
    timed = {(x.shape.k, x.shape.n, x.grad_input) for x, _ in clock.timed}
    assert timed == {(16, 32, True), (32, 64, True)}


def test_ctrl_c_while_timing_keeps_what_was_timed(
    tmp_path: Path, scripted_clock: type
) -> None:
    path = tmp_path / "fp8tune.json"

    def interrupted(signature: Signature, variant: str) -> float:
        if signature.shape.n == 32:
            raise KeyboardInterrupt
        return 1.0

    auto = AutoFloat8(
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)),
        recipe="bf16",
        warmup_steps=1,
        cache=path,
        clock=scripted_clock(interrupted),
    )
    auto(torch.randn(8, 32)).sum().backward()
    with pytest.raises(KeyboardInterrupt):
        auto.freeze()
    assert auto.phase == "warmup"
    assert len(json.loads(path.read_text())["measurements"]) == 1


@pytest.mark.parametrize(
    "damage",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "no JSON"),
        (
            lambda path: path.write_text('{"format": "fp8tune-cache", "version": 99}'),
            "version: found 99",
        ),
        (lambda path: (path.unlink(), path.mkdir()), "found a folder"),
    ],
    ids=["cut short", "newer format", "a directory"],
)
def test_training_goes_on_with_a_damaged_cache(
    cache: Path,
    damage: tuple[object, str],
    caplog: pytest.LogCaptureFixture,
    scripted_clock: type,
) -> None:
    damage_it, said = damage
    damage_it(cache)
    auto = first_run(cache, scripted_clock(big_is_faster))
    assert auto.plan.converted_fqns == ["0"]
    warnings = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    assert f"the cache {cache} could not be read: " in warnings[0]
    assert said in warnings[0]
