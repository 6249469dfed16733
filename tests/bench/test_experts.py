"""Blocks with experts: what they compute, and that policies and plans know the grouped GEMMs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from fp8tune.bench import race
from fp8tune.bench.experts import MixtureOfExperts, routes
from fp8tune.bench.grouped import grouped_mm
from fp8tune.bench.policies import Setting, compare_policies
from fp8tune.bench.race import PlanNames, Race
from fp8tune.bench.workloads import find_workloads, scaled_down
from fp8tune.compiling.dynamo import compile_without_limit
from fp8tune.recipes import get_recipe
from fp8tune.recipes.bf16 import BFloat16Recipe
from fp8tune.timing.cpu_clock import CpuClock

CPU = torch.device("cpu")
NAMES = ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-ep8", "gpt-oss-20b"]
EXPERTS = [f"block.feed_forward.experts.{x}" for x in ("gate_up_proj", "down_proj")]

pytestmark = pytest.mark.usefixtures("one_thread")


def workload(name, m=16):
    return replace(scaled_down(*find_workloads([name])), m=m)


def test_rows_go_to_different_experts_always_the_same_and_about_equally_many():
    chosen = routes(8192, 128, 8)
    assert torch.equal(chosen, routes(8192, 128, 8))
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    rows = chosen.flatten().bincount(minlength=128)
    assert 400 < rows.min() < 512 < rows.max() < 624


FAMILIES = {
    "mixtral-8x7b": ("mixtral", "Mixtral", "num_local_experts", "intermediate_size"),
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3Moe", "num_experts", "moe_intermediate_size"),
    "deepseek-v3-ep8": (
        *("deepseek_v3", "DeepseekV3"),
        *("n_routed_experts", "moe_intermediate_size"),
    ),
    "gpt-oss-20b": ("gpt_oss", "GptOss", "num_local_experts", "intermediate_size"),
}


def experts_of_transformers(name, w):
    family, prefix, count, hidden = FAMILIES[name]
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config = getattr(pytest.importorskip("transformers"), f"{prefix}Config")(
        hidden_size=w.dim, **{count: w.moe.experts, hidden: w.hidden}
    )
    config._experts_implementation = "grouped_mm"
    return getattr(module, f"{prefix}Experts")(config)


@pytest.mark.parametrize("name", NAMES)
def test_they_compute_what_those_of_transformers_compute(name):
    torch.manual_seed(0)
    w = workload(name)
    ours, theirs = MixtureOfExperts(w, w.moe), experts_of_transformers(name, w)
    own = dict(ours.experts.named_parameters())
    with torch.no_grad():
        for key, x in theirs.named_parameters():
            given = own[key.replace("_proj_bias", "_bias")]
            assert x.shape == given.shape
            x.copy_(given.normal_(std=0.1))
    x = torch.randn(1, w.m, w.dim)
    expected = theirs(x[0], ours.router.chosen, ours.router(x[0]))
    shared = 0 if ours.shared is None else ours.shared(x)
    torch.testing.assert_close(ours(x), expected.view_as(x) + shared)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_for_compilers_is_the_grouped_gemm(transposed):
    x = torch.randn(24, 16, requires_grad=True)
    weight = torch.randn(4, 16, 32, requires_grad=True)
    if not transposed:
        weight = weight.detach().mT.contiguous().mT.requires_grad_()
    offs = torch.tensor([3, 3, 20, 24], dtype=torch.int32)
    grad = torch.randn(24, 32)

    def run(call):
        y = call(x, weight, offs)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    expected = run(lambda *_: F.grouped_mm(x, weight, offs=offs))
    compiled = torch.compile(grouped_mm, backend="aot_eager", fullgraph=True)
    for found in (run(grouped_mm), run(compiled)):
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    opcheck(torch.ops.fp8tune.grouped_mm, (x, weight, offs))


@pytest.mark.parametrize("name", ["deepseek-v3-ep8", "gpt-oss-20b"])
def test_each_plan_of_a_compiled_block_is_that_plan(name, monkeypatch):
    """Also where only the route of the same module of experts changes."""
    monkeypatch.setitem(race.COMPILE, "backend", "eager")
    recipe, w = get_recipe("bf16", CPU), workload(name)
    both = [Race(w, recipe, CPU, CpuClock(), compiled=x) for x in (True, False)]
    seen = []
    plans = [[], EXPERTS[:1], EXPERTS[1:], EXPERTS, [], list(both[0].gemms)]
    with compile_without_limit():
        for plan in plans:
            for x in both:
                x.switch(PlanNames(plan))
            compiled, eager = (x._model().detach() for x in both)
            torch.testing.assert_close(compiled, eager)
            seen.append(eager)
    assert torch.equal(seen[0], seen[4])
    pairs = [(a, b) for a in seen[:4] for b in seen[:4] if a is not b]
    assert not any(torch.equal(a, b) for a, b in pairs)


class Filtered(BFloat16Recipe):
    """With a static filter that keeps every Linear, as torchao has them."""

    has_static_filter = True


class LinearsOnly(BFloat16Recipe):
    takes_experts = False


def outcome_of(recipe, clock):
    setting = Setting(
        recipe=recipe,
        device=CPU,
        clock=clock,
        compiled=False,
        max_seconds=0.01,
        max_compile_seconds=60,
    )
    outcome = compare_policies(workload("mixtral-8x7b"), setting)
    return outcome, {x.policy: set(x.converted) for x in outcome.rows}


def only_down_gains(signature, variant):
    if signature is None:
        return 100.0 - (EXPERTS[1] in variant) + 2 * (EXPERTS[0] in variant)
    gains = signature.shape.experts and signature.shape.n == 512
    return 0.5 if (variant != "reference") == bool(gains) else 1.0


def test_a_static_filter_leaves_experts_alone_and_everything_is_everything(
    scripted_clock,
):
    outcome, converted = outcome_of(Filtered(), scripted_clock(only_down_gains))
    everything = set(outcome.gemms)
    assert set(EXPERTS) < everything
    assert converted["all converted"] == everything
    assert converted["torchao's static filter"] == everything - set(EXPERTS)
    assert converted["fp8tune"] == {EXPERTS[1]}
    assert EXPERTS[1] in converted["oracle"]
    assert EXPERTS[0] not in converted["oracle"]
    assert outcome.plans == 16  # wq and wo, wk and wv, gate and up, down
    assert outcome.gemms[EXPERTS[0]] == (512, 3584, 8)


def test_a_recipe_for_linears_converts_no_experts(scripted_clock):
    outcome, converted = outcome_of(LinearsOnly(), scripted_clock(only_down_gains))
    assert converted["all converted"] == set(outcome.gemms) - set(EXPERTS)
    assert outcome.plans == 4
