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

from fp8tune import ConfigError, Plan
from fp8tune.integrations.lightning import AutoFloat8Callback
from fp8tune.recipes import BFloat16Linear

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fp8tune.records import Signature


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(x) for x in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def widening(signature: Signature, variant: str) -> float:
    """Layers with N > K gain, the others lose."""
    faster = signature.shape.n > signature.shape.k
    return 1.0 if variant == "reference" else (0.5 if faster else 2.0)


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
    assert callback.plan.float8_fqns == ["0"]
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
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=20, clock=clock)
    fit(tmp_path, callback)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        saved = torch.load(path, weights_only=True)
        stored = saved["callbacks"]["AutoFloat8Callback"]["plan"]
        assert Plan.from_dict(stored) == callback.plan
        assert list(saved["state_dict"]) == list(Model().state_dict())


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
    assert callback.plan.float8_fqns == names[:1]


def test_several_children_need_a_name(tmp_path: Path) -> None:
    callback = AutoFloat8Callback(recipe="bf16")
    with pytest.raises(
        ConfigError,
        match=r"TwoParts has no forward, .* are \['net', 'other'\]; say which one",
    ):
        trainer(tmp_path, callback).fit(TwoParts(), data())
