"""Tuning inside Transformers' Trainer; resuming goes on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from fp8tune import ConfigError, Plan, TuneConfig
from fp8tune.integrations.transformers import AutoFloat8Callback
from fp8tune.recipes import BFloat16Linear
from tests.helpers import widening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WIDENING = [
    f"model.layers.{i}.mlp.{role}_proj" for i in range(2) for role in ("gate", "up")
]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer(folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    rows = torch.randint(32, (48, 8), generator=torch.Generator().manual_seed(1))
    given = {
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **given),
        train_dataset=[{"input_ids": x, "labels": x} for x in rows],
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in trainer.state.log_history if "loss" in x}


def converted(model: torch.nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, BFloat16Linear)]


class Dies(TrainerCallback):
    """As when the machine goes away in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(folder: Path, clock: object) -> None:
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    trainer(folder, callback, Dies()).train()


@pytest.mark.slow
def test_save_kill_resume_is_as_the_uninterrupted_run(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    whole = trainer(tmp_path / "whole", callback)
    whole.train()
    assert callback.plan.converted_fqns == converted(whole.model) == WIDENING

    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "killed", scripted_clock(widening))
    process = context.Process(target=_train_and_die, args=arguments)
    process.start()
    process.join(50)
    assert process.exitcode == -signal.SIGKILL

    # A clock that must not be asked: the plan comes from the checkpoint.
    again = AutoFloat8Callback(recipe="bf16", clock=silent_clock)
    resumed = trainer(tmp_path / "killed", again)
    resumed.train(resume_from_checkpoint=True)
    assert again.plan == callback.plan
    assert converted(resumed.model) == WIDENING
    assert losses(resumed) == losses(whole)
    assert list(losses(resumed)) == list(range(1, 9))


def test_the_plan_decides_the_losses(tmp_path: Path, scripted_clock: type) -> None:
    """Otherwise equal losses after resuming would show nothing."""
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    tuned, plain = trainer(tmp_path / "a", callback), trainer(tmp_path / "b")
    tuned.train()
    plain.train()
    assert losses(tuned)[8] != losses(plain)[8]


def stored(folder: Path, step: int) -> dict[str, Any]:
    path = folder / f"checkpoint-{step}/trainer_state.json"
    return json.loads(path.read_text())["stateful_callbacks"]["fp8tune"]


def test_every_checkpoint_holds_the_state_or_the_plan(
    tmp_path: Path, scripted_clock: type
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=3, clock=clock)
    trainer(tmp_path, callback, max_steps=4, save_steps=2).train()
    state = stored(tmp_path, 2)
    assert (state["phase"], state["seen"]["steps"]) == ("warmup", 2)
    assert Plan.from_dict(stored(tmp_path, 4)["plan"]) == callback.plan


class SavesLate(TrainerCallback):
    """Asks for a checkpoint after the tuning callback was called."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in (2, 5)


def test_a_checkpoint_that_is_asked_for_late_has_it_too(
    tmp_path: Path, scripted_clock: type
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=3, clock=clock)
    run = trainer(tmp_path, callback, SavesLate(), save_strategy="no", max_steps=6)
    run.train()
    assert stored(tmp_path, 2)["seen"]["steps"] == 2
    assert Plan.from_dict(stored(tmp_path, 5)["plan"]) == callback.plan


def trial_ms(converted: set[str]) -> float:
    return 10.0 - len(converted)


@pytest.mark.parametrize(
    ("phase", "at", "options"),
    [
        ("warmup", 2, {"warmup_steps": 4}),
        ("warmup", 4, {"warmup_steps": 4}),
        ("trial", 6, {"warmup_steps": 2, "config": TuneConfig(trial_steps=24)}),
    ],
)
def test_tuning_that_was_stopped_goes_on_after_a_resume(
    tmp_path: Path,
    scripted_clock: type,
    phase: str,
    at: int,
    options: dict[str, Any],
) -> None:
    def train(folder: str, steps: int) -> tuple[Trainer, AutoFloat8Callback]:
        clock = scripted_clock(widening, trial_ms)
        callback = AutoFloat8Callback(recipe="bf16", clock=clock, **options)
        arguments: dict[str, Any] = {
            "lr_scheduler_type": "constant",
            "save_steps": at,
            "max_steps": steps,
        }
        run = trainer(tmp_path / folder, callback, **arguments)
        run.train(resume_from_checkpoint=folder == "stopped" and steps > at)
        return run, callback

    whole, callback = train("whole", 32)
    train("stopped", at)
    assert stored(tmp_path / "stopped", at)["phase"] == phase
    again, resumed = train("stopped", 32)
    assert losses(again) == losses(whole)
    assert resumed.plan == callback.plan
    assert converted(again.model) == converted(whole.model)


IN_TRIAL: dict[str, Any] = {
    "recipe": "bf16",
    "warmup_steps": 3,
    "config": TuneConfig(trial_steps=24),
}
LONG: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "save_steps": 2,
    "max_steps": 32,
}


def _die_in_trial(folder: Path, clock: object) -> None:
    callback = AutoFloat8Callback(clock=clock, **IN_TRIAL)
    trainer(folder, callback, Dies(), **LONG).train()


@pytest.mark.slow
def test_a_run_that_was_killed_in_warmup_or_trial_ends_as_the_uninterrupted_one(
    tmp_path: Path, scripted_clock: type
) -> None:
    clock = scripted_clock(widening, trial_ms)
    callback = AutoFloat8Callback(clock=clock, **IN_TRIAL)
    whole = trainer(tmp_path / "whole", callback, **LONG)
    whole.train()
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "killed", scripted_clock(widening, trial_ms))
    process = context.Process(target=_die_in_trial, args=arguments)
    process.start()
    process.join(50)
    assert process.exitcode == -signal.SIGKILL

    for step, phase in ((2, "warmup"), (6, "trial")):
        assert stored(tmp_path / "killed", step)["phase"] == phase
        clock = scripted_clock(widening, trial_ms)
        again = AutoFloat8Callback(clock=clock, **IN_TRIAL)
        run = trainer(tmp_path / f"from-{step}", again, **LONG)
        run.train(resume_from_checkpoint=str(tmp_path / f"killed/checkpoint-{step}"))
        assert losses(run) == losses(whole)
        assert again.plan == callback.plan


def test_a_plan_that_is_given_is_replayed(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    trainer(tmp_path / "a", callback, max_steps=2).train()
    again = AutoFloat8Callback(plan=callback.plan, clock=silent_clock)
    run = trainer(tmp_path / "b", again, max_steps=2)
    run.train()
    assert again.plan is callback.plan
    assert converted(run.model) == WIDENING


def test_callbacks_that_trainer_restores_are_no_obstacle(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    trainer(tmp_path, callback, max_steps=4).train()
    again = AutoFloat8Callback(recipe="bf16", clock=silent_clock)
    resumed = trainer(tmp_path, again, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert again.plan == callback.plan


def test_a_checkpoint_from_before_fp8tune_is_tuned(
    tmp_path: Path, scripted_clock: type
) -> None:
    trainer(tmp_path, max_steps=4).train()
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    trainer(tmp_path, callback).train(resume_from_checkpoint=True)
    assert callback.plan.converted_fqns == WIDENING


def test_the_table_is_logged_as_trainer_logs(
    tmp_path: Path,
    scripted_clock: type,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        transformers_logging.get_logger("transformers"), "propagate", True
    )
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    run = trainer(tmp_path, callback, max_steps=2, save_steps=9, log_level="info")
    run.train()
    said = [x.message for x in caplog.records if x.name == "transformers.fp8tune"]
    assert set(said) == {str(callback.plan)}
    entries = [x for x in run.state.log_history if "fp8tune_converted" in x]
    assert entries == [{"fp8tune_converted": 4, "fp8tune_linears": 15, "step": 2}]


def test_training_twice_goes_on_tuning(tmp_path: Path, scripted_clock: type) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=3, clock=clock)
    run = trainer(tmp_path, callback, max_steps=2, save_strategy="no")
    run.train()
    assert callback.plan is None
    run.train()  # its second step is the fourth
    assert callback.plan.converted_fqns == WIDENING


def test_torch_compile_is_left_to_the_callback(tmp_path: Path) -> None:
    callback = AutoFloat8Callback(recipe="bf16")
    run = trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="eager")
    with pytest.raises(
        ConfigError, match=r"pass compile=True .* to AutoFloat8Callback"
    ):
        run.train()


def test_the_callback_compiles_at_the_freeze(
    tmp_path: Path, scripted_clock: type
) -> None:
    compiled: list[torch.nn.Module] = []
    compile: Callable[[torch.nn.Module], None] = compiled.append
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(
        recipe="bf16", warmup_steps=1, clock=clock, compile=compile
    )
    run = trainer(tmp_path, callback, max_steps=3, save_strategy="no")
    run.train()
    assert compiled == [run.model]


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [x.getMessage() for x in caplog.records if "training ended" in x.message]


def test_a_run_that_ends_in_warmup_says_so_and_may_go_on(
    tmp_path: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=4, clock=clock)
    short = trainer(tmp_path, callback, max_steps=3)
    short.train()
    (line,) = warnings_in(caplog)
    assert "3 of 4 warmup steps were seen" in line
    assert converted(short.model) == []
    short.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["fp8tune"]["phase"] == "warmup"
    caplog.clear()
    short.train()
    assert callback.plan.converted_fqns == converted(short.model) == WIDENING
    assert warnings_in(caplog) == []
