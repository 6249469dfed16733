"""CUDA graphs of the user's, as far as they show without a GPU."""

import logging

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.compiling.apply import compile_for_trial
from tests.helpers import all_faster


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def step(module):
    module(torch.ones(8, 32)).square().mean().backward()
    module.zero_grad()


@pytest.mark.parametrize(
    ("compile", "asks"),
    [
        (False, False),
        (True, False),
        ({}, False),
        ({"mode": "default"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"options": {"triton.cudagraphs": True}}, True),
        ({"backend": "cudagraphs"}, True),
        ({"backend": "eager"}, False),
        (lambda module: module, False),
    ],
)
def test_who_asks_for_cuda_graphs(compile, asks):
    assert (compile_for_trial(compile) is not compile) is asks


@pytest.fixture
def compiled_with(monkeypatch):
    """The options that models were compiled with, without compiling them."""
    calls = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: calls.append(options)
    )
    return calls


def trained(clock, compile):
    config = TuneConfig(
        include_output_layer=True, static_filter="divisible", timing="eager"
    )
    auto = AutoFloat8(
        Model(),
        recipe="bf16",
        warmup_steps=1,
        compile=compile,
        clock=clock,
        config=config,
    )
    for _ in range(200):
        if auto.frozen:
            return auto
        step(auto)
    raise AssertionError("not frozen")


def test_plans_are_tried_without_graphs_and_the_winner_gets_them(
    scripted_clock, compiled_with, caplog
):
    caplog.set_level(logging.INFO, "fp8tune")
    asked = {"mode": "reduce-overhead"}
    trained(scripted_clock(all_faster, lambda names: 100.0 - len(names)), asked)
    tried, final = compiled_with
    assert tried["options"]["triton.cudagraphs"] is False
    assert final == asked
    assert "plans are tried without CUDA graphs" in caplog.text


def test_without_graphs_a_model_is_compiled_once(scripted_clock, compiled_with, caplog):
    trained(
        scripted_clock(all_faster, lambda names: 100.0 - len(names)), {"mode": None}
    )
    assert compiled_with == [{"mode": None}]
    assert "CUDA graphs" not in caplog.text


def test_torch_still_says_whether_a_stream_is_captured():
    assert callable(getattr(torch.cuda, "is_current_stream_capturing", None)), (
        "torch.cuda.is_current_stream_capturing is gone: fp8tune cannot tell any more that "
        "a model is captured while it is tuned"
    )


def test_a_forward_that_is_captured_is_not_tuned(scripted_clock, monkeypatch, caplog):
    config = TuneConfig(include_output_layer=True, static_filter="divisible")
    clock = scripted_clock(all_faster)
    auto = AutoFloat8(
        Model(), recipe="bf16", warmup_steps=3, clock=clock, config=config
    )
    for _ in range(3):
        step(auto)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        step(auto)
    assert not auto.frozen
    assert not clock.timed
    assert (
        caplog.text.count("is captured in a CUDA graph while fp8tune still tunes") == 1
    )
    assert "three warm-up steps" in caplog.text
    monkeypatch.undo()
    step(auto)
    assert auto.frozen
