"""What candidates run as until they are timed, and what is said when memory runs out."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fp8tune import AutoFloat8, TuneConfig
from fp8tune.config import Warmup
from fp8tune.errors import ConfigError
from fp8tune.recipes import BFloat16Linear
from fp8tune.tuner.warmup import WarmUp, rows_of, warmup_elements
from tests.helpers import all_faster

CUDA = torch.device("cuda", 0)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def kinds(module):
    return [type(x) for x in module if isinstance(x, nn.Linear)]


def step(module):
    module(torch.ones(8, 32)).square().mean().backward()


def auto_of(clock, **config):
    options = TuneConfig(include_output_layer=True, static_filter="divisible", **config)
    return AutoFloat8(
        model(), recipe="bf16", warmup_steps=1, clock=clock, config=options
    )


@pytest.mark.parametrize("warmup", [None, "converted", "reference"])
def test_the_warm_up_runs_converted_unless_asked_otherwise(scripted_clock, warmup):
    auto = auto_of(scripted_clock(all_faster), **({"warmup": warmup} if warmup else {}))
    during = nn.Linear if warmup == "reference" else BFloat16Linear
    assert kinds(auto.module) == [during] * 2
    step(auto)
    plan = auto.freeze()
    assert len(plan.converted_fqns) == 2
    assert kinds(auto.module) == [BFloat16Linear] * 2
    assert not auto.module._forward_hooks
    assert not auto.module._forward_hooks_always_called


def test_the_verdicts_do_not_depend_on_it(scripted_clock):
    plans = []
    for warmup in Warmup:
        auto = auto_of(scripted_clock(all_faster), warmup=warmup)
        step(auto)
        plans.append(str(auto.freeze()))
    assert len(set(plans)) == 1


def test_an_unknown_value_is_refused():
    with pytest.raises(ConfigError, match="warmup is 'bf16'; choose one of 'auto'"):
        TuneConfig(warmup="bf16")


# Where memory is known


class Candidates:
    """Candidates on a GPU that is simulated, and what they were made."""

    device = CUDA

    def __init__(self, gpu, *, free_gb, warmup="auto", ranks=1):
        memory = gpu.devices[0].memory
        memory.allocate(memory.total - free_gb * 2**30)
        self.module = model()
        self.candidates = [
            SimpleNamespace(fqn=i, linear=self.module[int(i)]) for i in "02"
        ]
        self.converted = None
        self.said = []
        options = SimpleNamespace(
            config=TuneConfig(warmup=warmup), ranks=SimpleNamespace(size=ranks)
        )
        self.warmup = WarmUp(
            self.module, self, options, lambda *args: self.said.append(args)
        )

    def convert(self, fqns):
        self.converted = list(fqns)

    def forward(self, gigabytes):
        # Elements of float32; the widest has 64 features.
        self.rows = int(gigabytes * 2**30 / 4 / (11.5 * 64 + 32 + 64))
        tensor = torch.ones(1, 32).expand(self.rows, 32)
        (hook,) = self.module._forward_pre_hooks.values()
        hook(self.module, (tensor,), {})


def test_a_forward_that_would_not_fit_stays_in_high_precision(gpu):
    candidates = Candidates(gpu, free_gb=10)
    assert candidates.converted == ["0", "2"]
    candidates.forward(11)
    assert candidates.converted == []
    ((level, words),) = candidates.said
    assert level == logging.INFO
    assert words.startswith("warming up in high precision: eager float8 layers would")
    assert f"about 11.0 GiB for {candidates.rows} rows, and 10.0 GiB are free" in words


def test_a_forward_that_fits_is_converted(gpu):
    candidates = Candidates(gpu, free_gb=10)
    candidates.forward(9)
    assert candidates.converted == ["0", "2"]
    assert candidates.said == []


@pytest.mark.parametrize(
    "options", [{"ranks": 2}, {"warmup": "converted"}, {"warmup": "reference"}]
)
def test_nothing_is_estimated_for_many_ranks_or_where_it_was_said(gpu, options):
    candidates = Candidates(gpu, free_gb=10, **options)
    assert not candidates.module._forward_pre_hooks
    expected = [] if options.get("warmup") == "reference" else ["0", "2"]
    assert candidates.converted == expected


def test_rows_are_tokens_or_what_features_leave():
    tokens, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7)
    assert rows_of(((), {"input_ids": tokens, "attention_mask": mask})) == 14
    assert rows_of(((torch.ones(3, 5, 8),), {})) == 15
    assert rows_of(((torch.tensor(1.0), "x", None), {})) == 1
    assert rows_of(((), {})) == 0


def test_the_estimate_is_what_is_saved_and_the_widest_layer():
    assert warmup_elements([(32, 64), (64, 16)], 10) == 10 * (32 + 64) + 11.5 * 10 * 64
    assert warmup_elements([], 10) == 0


class Full(nn.Linear):
    """Raises as a GPU does whose memory is full."""

    def forward(self, input):
        if self.error:
            raise self.error
        return super().forward(input)


@pytest.mark.parametrize(
    ("error", "warmup", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "auto", True),
        (RuntimeError("CUDA error: out of memory"), "converted", True),
        (torch.OutOfMemoryError("CUDA out of memory"), "reference", False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "auto", False),
    ],
)
def test_memory_that_runs_out_in_the_users_forward_names_the_setting(
    scripted_clock, caplog, error, warmup, said
):
    auto = auto_of(scripted_clock(all_faster), warmup=warmup)
    full = Full(32, 32)
    auto.module.append(full)
    full.error = error
    with pytest.raises(type(error), match=r"memory|shapes"):
        step(auto)
    assert ('TuneConfig(warmup="reference")' in caplog.text) is said
    error.__traceback__ = None  # which holds the pass that failed
    caplog.clear()
    full.error = None
    step(auto)
    auto.freeze()
    full.error = error
    with pytest.raises(type(error), match=r"memory|shapes"):
        step(auto)
    assert "warmup" not in caplog.text
