"""Several recipes at a time: each layer gets the best for it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp8tune import AutoFloat8, ConfigError, Plan, Reason, TuneConfig
from fp8tune.decision.records import REFERENCE
from fp8tune.recipes import (
    BFloat16Linear,
    BFloat16Recipe,
    register_recipe,
    resolve_recipes,
)
from tests.helpers import has_fast_bf16

THREE = ["rowwise", "tensorwise", "rowwise_with_gw_hp"]
EVERY_SIZE = TuneConfig(static_filter="divisible", include_output_layer=True)


class Widths(nn.Module):
    """A chain of Linears; ``a`` to ``e`` have different shapes, ``f`` is like ``a``."""

    def __init__(self):
        super().__init__()
        for name, k, n in [
            ("a", 16, 32),
            ("b", 32, 48),
            ("c", 48, 64),
            ("d", 64, 80),
            ("e", 80, 16),
            ("f", 16, 32),
        ]:
            setattr(self, name, nn.Linear(k, n))

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


# Milliseconds of each variant, by N; what is not said takes 2 ms.
BEST = {
    32: {"rowwise": 1.0, "tensorwise": 1.5},
    48: {"rowwise": 1.5, "tensorwise": 1.0},
    64: {"tensorwise": 1.8, "rowwise_with_gw_hp": 1.0},
    80: {"rowwise": 4.0, "tensorwise": 4.0, "rowwise_with_gw_hp": 4.0},
    16: {"rowwise": 1.0},
}
# What happens to these instead.
RAISED = {
    (48, "rowwise"): RuntimeError("no kernel for N=48\nand more"),
    (16, "tensorwise"): torch.OutOfMemoryError("9 GB"),
}


def script(signature, variant):
    error = RAISED.get((signature.shape.n, variant))
    if error:
        raise error
    return BEST[signature.shape.n].get(variant, 2.0)


def tuned(clock, recipe=THREE, module=None, **options):
    options.setdefault("config", EVERY_SIZE)
    auto = AutoFloat8(module or Widths(), recipe, clock=clock, **options)
    auto(torch.randn(8, 16)).sum().backward()
    auto.freeze()
    return auto


def variant(auto, fqn, recipe):
    return {x.recipe: x for x in auto.plan[fqn].variants}[recipe]


def test_every_layer_gets_its_own_best(scripted_clock):
    auto = tuned(scripted_clock(script))
    chosen = {x.fqn: x.recipe for x in auto.plan.decisions}
    assert chosen == {
        "a": "rowwise",
        "b": "tensorwise",
        "c": "rowwise_with_gw_hp",
        "d": None,
        "e": "rowwise",
        "f": "rowwise",
    }
    found = {fqn: x.config for fqn, x in auto.module.named_children() if fqn != "d"}
    assert found["a"] == found["e"] == found["f"]
    assert len({repr(x) for x in found.values()}) == 3
    assert type(auto.module.d) is nn.Linear
    assert auto.plan["d"].reason is Reason.SLOWER


def test_a_recipe_that_raises_is_left_out_for_that_shape_only(scripted_clock):
    auto = tuned(scripted_clock(script))
    unsupported = variant(auto, "b", "rowwise")
    assert unsupported.reason is Reason.NOT_MEASURED
    assert unsupported.detail == "RuntimeError: no kernel for N=48"
    out_of_memory = variant(auto, "e", "tensorwise")
    assert out_of_memory.reason is Reason.OUT_OF_MEMORY
    assert auto.plan["b"].speedup == auto.plan["e"].speedup == 2.0
    assert "not timed: rowwise: RuntimeError: no kernel for N=48" in str(auto.plan)
    assert "not timed: tensorwise: OutOfMemoryError: 9 GB" in str(auto.plan)


def test_a_recipe_that_stops_in_the_middle_does_not_stop_the_others(scripted_clock):
    left = {"rowwise": 3}

    def stopping(signature, variant):
        if variant in left:
            left[variant] -= 1
            if left[variant] < 0:
                raise RuntimeError("worked three times")
        return 1.0 if variant == "tensorwise" else 2.0

    auto = tuned(scripted_clock(stopping))
    assert {x.recipe for x in auto.plan.decisions} == {"tensorwise"}
    assert variant(auto, "a", "rowwise").detail == "RuntimeError: worked three times"


def test_the_reference_that_raises_leaves_nothing_to_compare(scripted_clock):
    def refusing(_, variant):
        if variant == REFERENCE:
            raise RuntimeError("no reference")
        return 1.0

    auto = tuned(scripted_clock(refusing))
    assert auto.plan.converted_fqns == []
    assert auto.plan["a"].detail == "RuntimeError: no reference"


def test_variants_run_forth_and_back_in_the_same_rounds(scripted_clock):
    order = []

    def remembering(signature, variant):
        order.append(variant)
        return {REFERENCE: 4.0, "rowwise": 2.0, "tensorwise": 1.0}[variant]

    module = nn.Sequential(nn.Linear(16, 16))
    tuned(scripted_clock(remembering), ["rowwise", "tensorwise"], module)
    there = [REFERENCE, "rowwise", "tensorwise"]
    back = there[::-1]
    assert order == [*there, *back, *back, *there] * 2


def test_sampling_goes_on_until_the_fastest_is_clear(scripted_clock):
    # Both are clearly faster than the reference, and alike but for noise.
    def close(signature, variant):
        calls[variant] += 1
        wobble = 0.1 * ((calls[variant] // 2 + (variant == "rowwise")) % 2)
        return 4.0 if variant == REFERENCE else 1.0 + wobble

    calls = Counter()
    module = nn.Sequential(nn.Linear(16, 16))
    auto = tuned(scripted_clock(close), ["rowwise", "tensorwise"], module)
    assert auto.plan["0"].samples == TuneConfig().max_samples


def test_one_signature_is_timed_once_with_every_recipe(scripted_clock):
    clock = scripted_clock(script)
    tuned(clock)
    variants = {REFERENCE, *THREE}
    for n in (32, 64, 80):
        assert {x: y for (s, x), y in clock.warmed.items() if s.shape.n == n} == (
            dict.fromkeys(variants, 1)
        )


def test_a_filter_of_one_recipe_leaves_the_layer_to_the_others(
    scripted_clock, own_registry
):
    class Fussy(BFloat16Recipe):
        name = "fussy"

        def supports(self, linear):
            return Reason.SMALL_KN if linear.out_features == 32 else None

    register_recipe("fussy", lambda _: Fussy())
    clock = scripted_clock(lambda _, x: {"fussy": 1.0, "bf16": 1.5}.get(x, 2.0))
    auto = tuned(clock, ["fussy", "bf16"])
    assert auto.plan["a"].recipe == auto.plan["f"].recipe == "bf16"
    assert variant(auto, "a", "fussy").reason is Reason.SMALL_KN
    assert auto.plan["b"].recipe == "fussy"
    assert not any(x.shape.n == 32 and y == "fussy" for x, y in clock.timed)


def test_warmup_runs_the_first_recipe_that_takes_the_layer(
    scripted_clock, own_registry
):
    class NotLarge(BFloat16Recipe):
        name = "not_large"

        def supports(self, linear):
            return Reason.SMALL_KN if linear.out_features > 48 else None

        def convert(self, linear):
            super().convert(linear)
            converted.append(linear.out_features)

    converted = []
    register_recipe("not_large", lambda _: NotLarge())
    clock = scripted_clock(script)
    auto = AutoFloat8(
        Widths(), ["not_large", "tensorwise"], clock=clock, config=EVERY_SIZE
    )
    assert converted == [32, 48, 16, 32]
    assert type(auto.module.c).__name__ == "Float8Linear"


def test_inside_reference_every_layer_is_plain_and_comes_back(scripted_clock):
    auto = tuned(scripted_clock(script))
    before = [type(x) for x in auto.module.children()]
    configs = [getattr(x, "config", None) for x in auto.module.children()]
    with auto.reference():
        assert {type(x) for x in auto.module.children()} == {nn.Linear}
    assert [type(x) for x in auto.module.children()] == before
    assert [getattr(x, "config", None) for x in auto.module.children()] == configs


def test_a_mixed_plan_is_applied_layer_by_layer(scripted_clock, tmp_path):
    auto = tuned(scripted_clock(script))
    auto.plan.save(tmp_path / "plan.json")
    plan, other = Plan.load(tmp_path / "plan.json"), Widths()
    assert plan == auto.plan
    plan.apply(other)
    for ours, theirs in zip(auto.module.children(), other.children(), strict=True):
        assert type(ours) is type(theirs)
        assert getattr(ours, "config", None) == getattr(theirs, "config", None)


def test_a_given_mixed_plan_is_frozen_at_once(scripted_clock, silent_clock):
    plan = tuned(scripted_clock(script)).plan
    auto = AutoFloat8(Widths(), plan.recipe, plan=plan, clock=silent_clock)
    assert auto.frozen
    configs = {repr(getattr(x, "config", None)) for x in auto.module.children()}
    assert len(configs) == 4


def test_a_second_run_finds_everything_in_the_cache(
    scripted_clock, silent_clock, tmp_path
):
    def supported(signature, variant):
        return BEST[signature.shape.n].get(variant, 2.0)

    path = tmp_path / "cache.json"
    first = tuned(scripted_clock(supported), cache=path)
    again = AutoFloat8(
        Widths(), THREE, cache=path, clock=silent_clock, config=EVERY_SIZE
    )
    again(torch.randn(8, 16)).sum().backward()
    again(torch.randn(8, 16))
    assert again.frozen
    assert again.plan == first.plan
    types = [type(x) for x in first.module.children()]
    assert [type(x) for x in again.module.children()] == types


def test_one_more_recipe_is_timed_alone(scripted_clock, tmp_path):
    path = tmp_path / "cache.json"
    tuned(scripted_clock(lambda *_: 1.0), ["rowwise"], cache=path)
    clock = scripted_clock(lambda _, x: 2.0 if x == REFERENCE else 1.0)
    tuned(clock, ["rowwise", "tensorwise"], cache=path)
    assert {x for _, x in clock.timed} == {REFERENCE, "tensorwise"}


def test_the_table_has_a_row_for_each_recipe_that_was_not_taken(scripted_clock):
    lines = str(tuned(scripted_clock(script)).plan).splitlines()
    rows = [" ".join(line.split()) for line in lines]
    start = next(i for i, row in enumerate(rows) if row.startswith("b "))
    assert rows[start].endswith("tensorwise: faster")
    assert rows[start + 1].endswith("not rowwise: not measured")
    assert rows[start + 2] == (
        "2.000 1.00 [1.00, 1.00] not rowwise_with_gw_hp: no clear difference"
    )
    summary = (
        "converted 5 of 6 Linears to rowwise (3) and rowwise_with_gw_hp (1) and "
        "tensorwise (1); not converted: 1 slower"
    )
    assert summary in rows


def test_the_log_has_all_recipes_of_a_signature_in_one_line(scripted_clock, caplog):
    caplog.set_level(logging.INFO, "fp8tune")
    tuned(scripted_clock(script))
    (line,) = [x for x in caplog.messages if x.startswith("[") and "N=48" in x]
    assert "rowwise: not measured (RuntimeError: no kernel for N=48)" in line
    assert "tensorwise 1.000 ms, 2.00x" in line


@pytest.mark.parametrize(
    "given", ["bf16, rowwise", "bf16,rowwise", ("bf16", "rowwise")]
)
def test_several_recipes_can_be_named(given):
    assert resolve_recipes(given, "cpu").names == ["bf16", "rowwise"]


def test_auto_is_every_recipe_that_needs_no_emulation(own_registry):
    assert resolve_recipes("auto", "cpu").names == ["bf16"]
    register_recipe("skipping", lambda _: Skipping())
    assert resolve_recipes("auto", "cpu").names == ["bf16", "skipping"]


@pytest.mark.parametrize("given", [[], ["rowwise", "rowwise"], "bf16,bf16"])
def test_recipes_must_be_told_apart(given):
    with pytest.raises(ConfigError, match="all of different names"):
        resolve_recipes(given, "cpu")


@pytest.mark.parametrize("name", ["auto", "a,b"])
def test_some_names_cannot_be_registered(name):
    with pytest.raises(ConfigError, match=f"a recipe cannot be called '{name}'"):
        register_recipe(name, lambda _: Skipping())


# With real clocks.


class SkippingLinear(nn.Linear):
    """Reads a quarter of the weight where there are few rows, and bf16 loses by casts."""

    def forward(self, x):
        if len(x) > 64:
            return super().forward(x)
        return F.linear(x, self.weight[: self.out_features // 4]).repeat(1, 4)


class Skipping:
    name = "skipping"
    reference = "float32"
    settings = ""
    emulated = False

    def supports(self, linear):
        return None if linear.bias is None else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear):
        del linear

    def convert(self, linear):
        linear.__class__ = SkippingLinear

    def revert(self, linear):
        linear.__class__ = nn.Linear


class FewAndMany(nn.Module):
    """One layer that sees every row, and many that see four."""

    def __init__(self):
        super().__init__()
        self.every_row = nn.Linear(512, 1024, bias=False)
        self.few_rows = nn.Sequential(
            *(nn.Linear(1024, 1024, bias=False) for _ in range(24))
        )
        # As in fine-tuning: the gradient of a large weight would cost most of the time.
        self.few_rows.requires_grad_(False)

    def forward(self, x):
        return self.few_rows(self.every_row(x)[:4])


def step_ms(module, x):
    start = time.perf_counter()
    module(x).square().mean().backward()
    module.zero_grad()
    return (time.perf_counter() - start) * 1e3


@pytest.mark.skipif(not has_fast_bf16(), reason="bf16 is faster on CPUs with AMX")
@pytest.mark.usefixtures("one_thread")
def test_with_real_clocks_the_mixed_plan_beats_each_recipe_alone(own_registry):
    register_recipe("skipping", lambda _: Skipping())
    config = TuneConfig(max_seconds=3, include_output_layer=True)
    x = torch.randn(1024, 512, requires_grad=True)
    autos = {}
    for recipe in (["bf16", "skipping"], ["bf16"], ["skipping"]):
        auto = AutoFloat8(FewAndMany(), recipe, warmup_steps=1, config=config)
        step_ms(auto, x)
        auto.freeze()
        autos[auto.plan.recipe] = auto
    mixed = autos["bf16, skipping"]
    assert mixed.plan["every_row"].recipe == "bf16"
    assert type(mixed.module.every_row) is BFloat16Linear
    assert {x.recipe for x in mixed.plan.decisions[1:]} == {"skipping"}
    assert autos["bf16"].plan.converted_fqns == ["every_row"]
    rounds = [{name: step_ms(x_, x) for name, x_ in autos.items()} for _ in range(40)]
    for other in ("bf16", "skipping"):
        ratios = [x[other] / x["bf16, skipping"] for x in rounds[5:]]
        assert median(ratios) > 1.03
