"""Tuning inside Lightning's Trainer; resuming goes on as if nothing had happened."""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp8tune import ConfigError, Plan, TuneConfig
from fp8tune.integrations.lightning import AutoFloat8Callback
from fp8tune.recipes import BFloat16Linear
from tests.helpers import widening

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(x) for x in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


class Model(LightningModule):
    """Has no forward, as most."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
        self.losses: dict[int, float] = {}

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = (self.net(batch[0]) - batch[0].sin()).square().mean()
        self.losses[self.global_step] = loss.item()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class WithForward(Model):
    """Calls itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return (self(batch[0]) - batch[0].sin()).square().mean()


class TwoParts(Model):
    """Has two children with Linears, of which one trains."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 16)


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    # Four batches, so that checkpoints come at the ends of epochs.
    rows = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(rows), batch_size=4)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    given = {
        "max_steps": 8,
        "logger": False,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
    return Trainer(default_root_dir=folder, callbacks=[*callbacks, saving], **given)


def fit(folder: Path, *callbacks: Callback, ckpt_path: Path | None = None) -> Model:
    seed_everything(0, verbose=False)
    model = Model()
    trainer(folder, *callbacks).fit(model, data(), ckpt_path=ckpt_path)
    return model


def converted(model: nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, BFloat16Linear)]


class Dies(Callback):
    """As when the machine goes away in the middle of a step."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def _fit_and_die(folder: Path, clock: object) -> None:
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    fit(folder, callback, Dies())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_save_kill_resume_is_as_the_uninterrupted_run(
    tmp_path: Path, scripted_clock: type, silent_clock: object
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    whole = fit(tmp_path / "whole", callback)
    assert callback.plan.converted_fqns == ["0"]
    assert converted(whole) == ["net.0"]

    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "killed", scripted_clock(widening))
    process = context.Process(target=_fit_and_die, args=arguments)
    process.start()
    process.join(50)
    assert process.exitcode == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "killed").glob("*.ckpt")

    # A clock that must not be asked: the plan comes from the checkpoint.
    again = AutoFloat8Callback(recipe="bf16", clock=silent_clock)
    resumed = fit(tmp_path / "killed", again, ckpt_path=checkpoint)
    assert again.plan == callback.plan
    assert converted(resumed) == ["net.0"]
    assert resumed.losses == {x: whole.losses[x] for x in range(4, 8)}


def test_the_plan_decides_the_losses(tmp_path: Path, scripted_clock: type) -> None:
    """Otherwise equal losses after resuming would show nothing."""
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    tuned, plain = fit(tmp_path / "a", callback), fit(tmp_path / "b")
    assert tuned.losses[7] != plain.losses[7]


def test_the_plan_is_in_the_checkpoint(tmp_path: Path, scripted_clock: type) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=5, clock=clock)
    fit(tmp_path, callback)
    early, late = sorted(tmp_path.glob("*.ckpt"))
    first, last = (state_in(x) for x in (early, late))
    assert (first["phase"], first["seen"]["steps"]) == ("warmup", 4)
    assert Plan.from_dict(last["plan"]) == callback.plan
    saved = torch.load(late, weights_only=True)
    assert list(saved["state_dict"]) == list(Model().state_dict())


def state_in(path: Path) -> dict[str, Any]:
    saved = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [x for name, x in saved.items() if "AutoFloat8Callback" in name]
    return state


def trial_ms(converted: set[str]) -> float:
    return 10.0 - len(converted)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(
    ("phase", "options"),
    [
        ("warmup", {"warmup_steps": 6}),
        ("warmup", {"warmup_steps": 4}),
        ("trial", {"warmup_steps": 1, "config": TuneConfig(trial_steps=24)}),
    ],
)
def test_tuning_that_was_stopped_goes_on_after_a_resume(
    tmp_path: Path, scripted_clock: type, phase: str, options: dict[str, Any]
) -> None:
    def train(folder: str, steps: int, ckpt: Path | None = None) -> Any:
        clock = scripted_clock(widening, trial_ms)
        callback = AutoFloat8Callback(recipe="bf16", clock=clock, **options)
        seed_everything(0, verbose=False)
        model = Model()
        run = trainer(tmp_path / folder, callback, max_steps=steps)
        run.fit(model, data(), ckpt_path=ckpt)
        return model, callback

    whole, callback = train("whole", 32)
    train("stopped", 4)
    (checkpoint,) = (tmp_path / "stopped").glob("*.ckpt")
    assert state_in(checkpoint)["phase"] == phase
    again, resumed = train("stopped", 32, checkpoint)
    assert again.losses == {x: whole.losses[x] for x in range(4, 32)}
    assert resumed.plan == callback.plan
    assert converted(again) == converted(whole)


IN_TRIAL: dict[str, Any] = {
    "recipe": "bf16",
    "warmup_steps": 4,
    "config": TuneConfig(trial_steps=24),
}


class DiesLate(Callback):
    """In the trial, after two checkpoints."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)


def _fit_long(folder: Path, *callbacks: Callback, ckpt: Path | None = None) -> Model:
    seed_everything(0, verbose=False)
    model = Model()
    trainer(folder, *callbacks, max_steps=36).fit(model, data(), ckpt_path=ckpt)
    return model


def _die_in_trial(folder: Path, clock: object) -> None:
    _fit_long(folder, AutoFloat8Callback(clock=clock, **IN_TRIAL), DiesLate())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_was_killed_in_warmup_or_trial_ends_as_the_uninterrupted_one(
    tmp_path: Path, scripted_clock: type
) -> None:
    def tuning() -> AutoFloat8Callback:
        return AutoFloat8Callback(clock=scripted_clock(widening, trial_ms), **IN_TRIAL)

    callback = tuning()
    whole = _fit_long(tmp_path / "whole", callback)
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "killed", scripted_clock(widening, trial_ms))
    process = context.Process(target=_die_in_trial, args=arguments)
    process.start()
    process.join(50)
    assert process.exitcode == -signal.SIGKILL

    found = {state_in(x)["phase"]: x for x in (tmp_path / "killed").glob("*.ckpt")}
    assert sorted(found) == ["trial", "warmup"]
    for phase, checkpoint in found.items():
        again = tuning()
        model = _fit_long(tmp_path / phase, again, ckpt=checkpoint)
        first = min(model.losses)
        assert model.losses == {x: whole.losses[x] for x in range(first, 36)}
        assert again.plan == callback.plan


def test_how_many_layers_were_converted_is_logged(
    tmp_path: Path, scripted_clock: type
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=1, clock=clock)
    logger = CSVLogger(tmp_path / "logs")
    trainer(tmp_path / "run", callback, logger=logger, max_steps=3).fit(Model(), data())
    (path,) = (tmp_path / "logs").rglob("metrics.csv")
    with path.open() as file:
        (entry,) = csv.DictReader(file)
    assert entry == {"fp8tune_converted": "1.0", "fp8tune_linears": "2.0", "step": "2"}


@pytest.mark.parametrize(
    ("kind", "name", "names"),
    [
        (Model, None, ["0", "2"]),
        (Model, "net", ["0", "2"]),
        (WithForward, None, ["net.0", "net.2"]),
        (TwoParts, "net", ["0", "2"]),
    ],
)
def test_which_module_is_tuned(
    tmp_path: Path,
    scripted_clock: type,
    kind: type[Model],
    name: str | None,
    names: list[str],
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(name, recipe="bf16", warmup_steps=1, clock=clock)
    trainer(tmp_path, callback, max_steps=3).fit(kind(), data())
    assert [x.fqn for x in callback.plan.decisions] == names
    assert callback.plan.converted_fqns == names[:1]


def test_several_children_need_a_name(tmp_path: Path) -> None:
    callback = AutoFloat8Callback(recipe="bf16")
    with pytest.raises(
        ConfigError,
        match=r"TwoParts has no forward, .* are \['net', 'other'\]; say which one",
    ):
        trainer(tmp_path, callback).fit(TwoParts(), data())


def test_a_run_that_ends_in_warmup_says_so_and_may_go_on(
    tmp_path: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=4, clock=clock)
    model = Model()
    short = trainer(tmp_path, callback, max_steps=3)
    short.fit(model, data())
    said = [x.message for x in caplog.records if "training ended" in x.message]
    assert len(said) == 1
    assert "3 of 4 warmup steps were seen" in said[0]
    assert converted(model) == []
    short.save_checkpoint(tmp_path / "late.ckpt")
    again = AutoFloat8Callback(recipe="bf16", warmup_steps=4, clock=clock)
    again.load_state_dict(state_in(tmp_path / "late.ckpt"))
    model = fit(tmp_path / "again", again)
    assert again.plan.converted_fqns == ["0"]
    assert converted(model) == ["net.0"]


class Fails(Callback):
    """As a batch that cannot be read."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 2:
            raise OSError("no such batch")


def test_a_fit_that_is_broken_off_in_warmup_leaves_a_plain_model(
    tmp_path: Path, scripted_clock: type, caplog: pytest.LogCaptureFixture
) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=4, clock=clock)
    model = Model()
    with pytest.raises(OSError, match="no such batch"):
        trainer(tmp_path, callback, Fails()).fit(model, data())
    (said,) = [x.message for x in caplog.records if "training ended" in x.message]
    assert "2 of 4 warmup steps were seen" in said
    assert converted(model) == []
    trainer(tmp_path, callback).fit(model, data())
    assert converted(model) == ["net.0"]
