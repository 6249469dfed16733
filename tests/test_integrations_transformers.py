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

from fp8tune import ConfigError, Plan
from fp8tune.integrations.transformers import AutoFloat8Callback
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fp8tune.records import Signature

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


def widening(signature: Signature, variant: str) -> float:
    """Layers with N > K gain, the others lose."""
    faster = signature.shape.n > signature.shape.k
    return 1.0 if variant == "reference" else (0.5 if faster else 2.0)


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
    assert callback.plan.float8_fqns == converted(whole.model) == WIDENING

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


def test_every_checkpoint_holds_the_plan(tmp_path: Path, scripted_clock: type) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=5, clock=clock)
    trainer(tmp_path, callback, max_steps=4, save_steps=2).train()
    for step in (2, 4):
        state = json.loads(
            (tmp_path / f"checkpoint-{step}/trainer_state.json").read_text()
        )
        stored = state["stateful_callbacks"]["fp8tune_plan"]
        assert Plan.from_dict(stored) == callback.plan


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
    assert callback.plan.float8_fqns == WIDENING


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
    auto = callback.auto
    run.train()
    assert callback.auto is auto
    assert callback.plan.float8_fqns == WIDENING


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
    run = trainer(tmp_path, callback, max_steps=3)
    run.train()
    assert compiled == [run.model]
