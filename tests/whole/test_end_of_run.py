"""A run that ends before its tuning does says so, and leaves nothing half done."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8
from fp8tune.recipes import BFloat16Linear
from tests.helpers import all_faster, hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable


def step(model: nn.Module) -> None:
    model(torch.randn(8, 64)).square().mean().backward()


@pytest.fixture
def tune(scripted_clock: type) -> Callable[..., AutoFloat8]:
    def tune(**options: Any) -> AutoFloat8:
        clock = scripted_clock(all_faster, lambda _: 1.0)
        module = nn.Sequential(nn.Linear(64, 64))
        return AutoFloat8(module, recipe="bf16", clock=clock, **options)

    return tune


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    return [x for x in found if "training ended" in x]


def nothing(auto: AutoFloat8) -> None:
    del auto


def one_step(auto: AutoFloat8) -> None:
    step(auto)


def forwards(auto: AutoFloat8) -> None:
    for _ in range(4):
        auto(torch.randn(8, 64))


def without_optimizer_step(auto: AutoFloat8) -> None:
    optimizer = torch.optim.SGD(auto.parameters(), lr=0.1)
    for _ in range(6):
        step(auto)
    del optimizer


@pytest.mark.parametrize("how", ["hook", "forgotten"])
@pytest.mark.parametrize(
    ("train", "seen", "cause"),
    [
        (nothing, 0, "None of its layers was called with gradients"),
        (forwards, 0, "It was called 4 times with gradients, but none came back"),
        (without_optimizer_step, 0, "The last 6 calls are taken for micro-batches"),
        (one_step, 1, "Train for more than 3 steps, lower warmup_steps"),
    ],
)
def test_a_run_that_ends_in_warmup_names_the_likely_cause(
    tune: Callable[..., AutoFloat8],
    caplog: pytest.LogCaptureFixture,
    *,
    train: Callable[[AutoFloat8], None],
    seen: int,
    cause: str,
    how: str,
) -> None:
    auto = tune()
    train(auto)
    if how == "hook":
        auto.tuner.end_of_run()
    else:
        del auto
        gc.collect()
        seen = 0  # of the last step nobody can tell any more whether it was over
    (line,) = said(caplog)
    assert f"{seen} of 3 warmup steps were seen" in line
    assert cause in line


def test_what_was_never_measured_is_reverted(tune: Callable[..., AutoFloat8]) -> None:
    auto = tune()
    step(auto)
    assert type(auto.module[0]) is BFloat16Linear
    auto.tuner.end_of_run()
    assert type(auto.module[0]) is nn.Linear
    assert hooks_of(auto.module) == {}
    assert auto.phase == "abandoned"
    auto.tuner.end_of_run()


def test_a_trial_ends_with_what_was_measured(
    tune: Callable[..., AutoFloat8], caplog: pytest.LogCaptureFixture
) -> None:
    auto = tune(compile={"backend": "eager"}, warmup_steps=1)
    for _ in range(3):
        step(auto)
    assert auto.phase == "trial"
    auto.tuner.end_of_run()
    assert auto.frozen
    assert auto.phase == "frozen"
    assert len(said(caplog)) == 1


@pytest.mark.parametrize("ended", ["frozen", "abandoned"])
def test_who_is_done_says_nothing(
    tune: Callable[..., AutoFloat8], caplog: pytest.LogCaptureFixture, ended: str
) -> None:
    auto = tune(warmup_steps=1)
    for _ in range(2):
        step(auto)
    assert auto.frozen
    if ended == "abandoned":
        auto.abandon()
    auto.tuner.end_of_run()
    assert auto.phase == ended
    del auto
    gc.collect()
    assert said(caplog) == []


def test_the_model_is_not_kept_alive(tune: Callable[..., AutoFloat8]) -> None:
    auto = tune()
    step(auto)
    model = weakref.ref(auto.module)
    del auto
    gc.collect()
    assert model() is None


SCRIPT = """
import torch
from torch import nn
from fp8tune import AutoFloat8

model = nn.Sequential(nn.Linear(64, 64))
auto = AutoFloat8(model, recipe="bf16", warmup_steps={})
for _ in range(2):
    model(torch.randn(8, 64)).sum().backward()
"""


@pytest.mark.parametrize(("warmup_steps", "warned"), [(3, True), (1, False)])
def test_a_process_that_ends(warmup_steps: int, warned: bool) -> None:
    run = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", SCRIPT.format(warmup_steps)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("training ended before tuning did" in run.stderr) is warned
