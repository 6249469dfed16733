"""Plans in the words of other trainers: substrings, exact names, text to paste."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torchao.float8.float8_linear import Float8Linear

from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import Decision, Shape, Signature, Verdict
from fp8tune.errors import ExportError, PlanMismatchError
from fp8tune.plan.cover import smallest_cover
from fp8tune.plan.export import TARGETS, export_lines
from fp8tune.plan.plan import Plan
from fp8tune.plan.quantize import MX_RECIPES
from tests.helpers import needs_mxfp8

if TYPE_CHECKING:
    from collections.abc import Sequence


def plan_of(
    float8: list[str], reference: list[str], recipe: str = "rowwise", size: int = 16
) -> Plan:
    converted = [
        Decision(x, size, size, Verdict.CONVERTED, Reason.FASTER, recipe=recipe)
        for x in float8
    ]
    left = [
        Decision(x, size, size, Verdict.REFERENCE, Reason.SLOWER) for x in reference
    ]
    return Plan((*converted, *left), recipe, "bfloat16", False, "eager", ())


def names_of_llama(layers: int, roles: list[str]) -> list[str]:
    return [f"layers.{i}.{role}" for i in range(layers) for role in roles]


def split(names: list[str], left_out: list[str]) -> Plan:
    """A plan that converts every name that contains none of these."""
    excluded = [x for x in names if any(y in x for y in left_out)]
    return plan_of([x for x in names if x not in excluded], excluded)


class TestSubstrings:
    def test_roles_are_named_by_whole_segments(self) -> None:
        roles = ["attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"]
        names = [*names_of_llama(32, roles), "output"]
        plan = split(names, ["wk", "wv", "output"])
        assert plan.substring_excludes(names) == ["output", "wk", "wv"]

    def test_one_substring_may_serve_several_roles(self) -> None:
        names = names_of_llama(4, ["mlp.up", "attn.q", "attn.k"])
        plan = split(names, ["attn"])
        assert plan.substring_excludes(names) == ["attn"]

    def test_first_and_last_block(self) -> None:
        names = names_of_llama(12, ["w1", "w2"])
        plan = split(names, ["layers.0.", "layers.11."])
        assert plan.substring_excludes(names) == [".0", "11"]

    def test_a_name_inside_a_converted_one_is_refused_with_both(self) -> None:
        names = [f"layers.{i}" for i in range(11)]
        plan = plan_of([x for x in names if x != "layers.1"], ["layers.1"])
        with pytest.raises(
            ExportError,
            match=r"leaves out 'layers\.1' also leaves out 'layers\.10', whose name",
        ):
            plan.substring_excludes(names)

    def test_a_model_that_is_itself_a_linear(self) -> None:
        assert plan_of([""], []).substring_excludes(nn.Linear(16, 16)) == []
        assert plan_of([], [""]).substring_excludes([""]) == [""]
        with pytest.raises(ExportError, match=r"leaves out '\(root\)' also leaves out"):
            plan_of(["a"], [""]).substring_excludes(["", "a"])

    def test_nothing_or_everything_left_out(self) -> None:
        assert plan_of(["a.b", "c"], []).substring_excludes(["a.b", "c"]) == []
        assert plan_of([], ["a.b", "c"]).substring_excludes(["a.b", "c"]) == [""]

    def test_a_linear_that_the_plan_does_not_know_is_left_out(self) -> None:
        plan = plan_of(["a"], ["b"])
        assert plan.substring_excludes(["a", "b", "new"]) == ["b", "new"]

    def test_a_converted_layer_that_the_target_lacks_is_said(self) -> None:
        plan = plan_of(["a", "b"], [])
        with pytest.raises(
            PlanMismatchError, match=r"converts 'b', but the target has no Linear"
        ):
            plan.substring_excludes(["a"])

    def test_a_model_may_be_given_wrapped(self) -> None:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        plan = plan_of(["0"], ["1"])
        wrapped = checkpoint_wrapper(nn.Sequential(*model))
        assert plan.substring_excludes(torch.compile(wrapped)) == ["1"]
        assert plan.exact_fqns(wrapped) == ["1"]


SEGMENTS = st.sampled_from(["a", "b", "ab", "1", "10", "11", "w1", "w10", "_"])
FQNS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@st.composite
def plans(draw: st.DrawFn, most: int = 16) -> Plan:
    names = draw(st.lists(FQNS, unique=True, min_size=1, max_size=most))
    flags = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    pairs = list(zip(names, flags, strict=True))
    return plan_of(
        [x for x, kept in pairs if kept], [x for x, kept in pairs if not kept]
    )


def left_out_by(substrings: Sequence[str], names: list[str]) -> list[str]:
    return [name for name in names if any(x in name for x in substrings)]


@given(plans())
@settings(deadline=None, max_examples=300)
def test_substrings_reproduce_the_plan_or_are_refused(plan: Plan) -> None:
    kept, left = plan.converted_fqns, plan.reference_fqns
    impossible = any(name in other for name in left for other in kept)
    try:
        substrings = plan.substring_excludes(kept + left)
    except ExportError:
        assert impossible
    else:
        assert not impossible
        assert left_out_by(substrings, kept + left) == left


@given(plans(most=6))
@settings(deadline=None, max_examples=100)
def test_no_shorter_list_of_substrings_would_do(plan: Plan) -> None:
    names = plan.converted_fqns + plan.reference_fqns
    try:
        found = plan.substring_excludes(names)
    except ExportError:
        return
    every = {x[i:j] for x in names for i in range(len(x)) for j in range(i + 1, 99)}
    if found:
        fewer = combinations(sorted(every), len(found) - 1)
        left = plan.reference_fqns
        assert all(left_out_by(x, names) != left for x in islice(fewer, 20_000))


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=2),
        st.frozensets(st.integers(0, 7), min_size=1),
        min_size=1,
        max_size=7,
    )
)
def test_a_cover_holds_everything_and_is_the_smallest(
    sets: dict[str, frozenset[int]],
) -> None:
    everything = frozenset().union(*sets.values())
    chosen = smallest_cover(sets)
    assert frozenset().union(*(sets[x] for x in chosen)) == everything
    fewer = combinations(sets.values(), len(chosen) - 1)
    assert all(frozenset().union(*x) != everything for x in fewer)


def test_a_large_model_takes_no_time() -> None:
    roles = [f"block.experts.{i}.w{j}" for i in range(8) for j in (1, 2, 3)]
    names = names_of_llama(60, [*roles, "attention.wo", "attention.wk"])
    plan = split(names, ["wk", "experts.3.w2", "layers.59."])
    substrings = plan.substring_excludes(names)
    assert len(substrings) == 3
    assert left_out_by(substrings, names) == plan.reference_fqns


class TestNames:
    """What wrappers add to names, and what belongs to the model."""

    def test_data_parallel_adds_module(self) -> None:
        plan = plan_of(["0"], ["1"])
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        plan.apply(nn.DataParallel(model))
        assert isinstance(model[0], Float8Linear)
        assert type(model[1]) is nn.Linear
        assert plan.module_filter_fn(nn.Linear(16, 16), "module.0")
        assert plan["module.1"].verdict is Verdict.REFERENCE

    def test_a_child_called_module_is_no_wrapper(self) -> None:
        model = nn.ModuleDict({"module": nn.Linear(16, 16), "x": nn.Linear(16, 16)})
        plan = plan_of(["module"], ["x"])
        assert plan.exact_fqns(model) == ["x"]
        assert plan.exact_fqns(nn.DataParallel(model)) == ["x"]
        nested = plan_of(["module.x"], ["x"])
        inner = nn.ModuleDict({"x": nn.Linear(16, 16)})
        outer = nn.ModuleDict({"module": inner, "x": nn.Linear(16, 16)})
        assert nested.exact_fqns(outer) == ["x"]
        assert not nested.module_filter_fn(nn.Linear(16, 16), "x")
        assert nested.module_filter_fn(nn.Linear(16, 16), "module.module.x")

    def test_a_wrapped_linear_itself(self) -> None:
        model = nn.DataParallel(nn.Linear(16, 16))
        assert plan_of([""], []).exact_fqns(model) == []


class Small(nn.Module):
    """Four Linears under names as in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"wk": nn.Linear(16, 16), "w1": nn.Linear(16, 16)})
            for _ in range(2)
        )


def converted(model: nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, Float8Linear)]


NAMES = ["layers.0.w1", "layers.1.w1"], ["layers.0.wk", "layers.1.wk"]


class TestText:
    def test_torchao(self) -> None:
        """The text is a program that converts as the plan says."""
        model = Small()
        plan = plan_of(*NAMES)
        exec("\n".join(export_lines(plan, "torchao")), {"model": model})  # noqa: S102
        assert converted(model) == plan.converted_fqns
        assert model.layers[0]["w1"].config.pad_inner_dim

    def test_accelerate(self) -> None:
        """The same filter function, given to accelerate."""
        pytest.importorskip("accelerate", exc_type=ModuleNotFoundError)
        plan = plan_of(*NAMES)
        lines = export_lines(plan, "accelerate")
        assert lines[-1] == (
            'accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])'
        )
        namespace: dict[str, object] = {}
        exec("\n".join(lines[:-1]), namespace)  # noqa: S102
        recipe = namespace["recipe"]
        names = plan.converted_fqns + plan.reference_fqns
        found = [x for x in names if recipe.module_filter_func(nn.Linear(16, 16), x)]
        assert found == plan.converted_fqns

    def test_torchtitan(self) -> None:
        assert export_lines(plan_of(*NAMES), "torchtitan") == [
            "# converted 2 of 4 Linears to rowwise; not converted: 2 slower",
            "Float8LinearConverter.Config(",
            '    recipe_name="rowwise",',
            "    filter_fqns=[",
            '        "wk",',
            "    ],",
            ")",
        ]

    def test_automodel(self) -> None:
        text = "\n".join(
            export_lines(plan_of(*NAMES, recipe="tensorwise"), "automodel")
        )
        assert yaml.safe_load(text) == {
            "fp8": {
                "enabled": True,
                "recipe_name": "tensorwise",
                "filter_fqns": ["wk"],
            }
        }

    def test_olmo(self) -> None:
        assert export_lines(plan_of(*NAMES), "olmo")[1:] == [
            "Float8Config(",
            "    ao_recipe=AOFloat8LinearRecipe.rowwise,",
            "    modules_to_ignore=[",
            '        "layers.0.wk",',
            '        "layers.1.wk",',
            "    ],",
            ")",
        ]

    def test_olmo_never_converts_its_head(self) -> None:
        plan = plan_of(["lm_head.w_out"], [])
        with pytest.raises(
            ExportError, match=r"'lm_head\.w_out', which OLMo-core never"
        ):
            export_lines(plan, "olmo")

    def test_an_unknown_target_lists_the_known(self) -> None:
        with pytest.raises(
            ExportError, match=r"unknown target 'titan'; choose one of accelerate, auto"
        ):
            export_lines(plan_of(*NAMES), "titan")

    @pytest.mark.parametrize("target", sorted(TARGETS))
    def test_a_recipe_that_the_target_does_not_know(self, target: str) -> None:
        with pytest.raises(ExportError, match=rf"recipe 'bf16', and {target} knows"):
            export_lines(plan_of(*NAMES, recipe="bf16"), target)

    def test_torchtitan_knows_no_tensorwise(self) -> None:
        with pytest.raises(
            ExportError,
            match=r"torchtitan knows rowwise, rowwise_with_gw_hp; tune with",
        ):
            export_lines(plan_of(*NAMES, recipe="tensorwise"), "torchtitan")


# Fields of a recipe and their defaults, as Megatron-LM documents them in
# TEQuantizationRecipe; it raises for any other.
MEGATRON_RECIPE = {
    "fp8_quantization_recipe": None,
    "fp4_quantization_recipe": None,
    "custom_recipe_factory": None,
    "fp8_format": "e4m3",
    "override_quantized_autocast": True,
    "override_nonquantized_autocast": False,
    "tp_only_amax_red": False,
}


def recipe_of_megatron(config: dict[str, Any]) -> dict[str, Any]:
    """A config's recipe with its defaults, parsed by Megatron-LM's rules."""
    assert set(config) == {"transformer_engine_config_type", "training_recipe"}
    assert config["transformer_engine_config_type"] == "TEQuantizationParams"
    recipe = config["training_recipe"]
    assert set(recipe) <= set(MEGATRON_RECIPE)
    whole = MEGATRON_RECIPE | recipe
    assert whole["fp8_quantization_recipe"] in (
        None,
        "tensorwise",
        "mxfp8",
        "blockwise",
    )
    assert whole["fp8_format"] in ("e4m3", "hybrid")
    assert {type(whole[x]) for x in whole if x.startswith("override")} == {bool}
    return whole


def runs_in_megatron(
    config: dict[str, Any], *, globally: bool
) -> tuple[str, str] | str | None:
    """What a layer with that config runs as where --fp8-format is given, or is not."""
    recipe = recipe_of_megatron(config)
    overrides = "override_quantized_autocast"
    if not globally:
        overrides = "override_nonquantized_autocast"
    if not recipe[overrides]:
        return "as --fp8-format says" if globally else None
    name = recipe["fp8_quantization_recipe"]
    return name and (name, recipe["fp8_format"])


class TestMegatron:
    @staticmethod
    def chosen(text: str, names: Sequence[str]) -> dict[str, str]:
        """The config of each name, as Megatron-LM documents it: the first that fits."""
        document = yaml.safe_load(text)
        assert set(document) == {"configs", "matchers"}
        for config in document["configs"].values():
            recipe_of_megatron(config)
        matchers = [x for x in document["matchers"].values() if x["enabled"]]
        assert {x["type"] for x in matchers} == {"glob"}
        return {
            name: next(x["config"] for x in matchers if fnmatch(name, x["pattern"]))
            for name in names
        }

    @pytest.mark.parametrize("globally", [False, True])
    @pytest.mark.parametrize(
        ("recipe", "runs"),
        [
            ("tensorwise", ("tensorwise", "hybrid")),
            ("blockwise", ("blockwise", "e4m3")),
            ("mxfp8_rceil", ("mxfp8", "e4m3")),
            ("mxfp8_floor", ("mxfp8", "e4m3")),
        ],
    )
    def test_the_plan_holds_with_and_without_megatrons_own_fp8(
        self, globally: bool, recipe: str, runs: tuple[str, str]
    ) -> None:
        plan = plan_of(["layers.0.up", "layers.1.up"], ["output"], recipe)
        text = "\n".join(export_lines(plan, "megatron"))
        chosen = self.chosen(text, ["layers.1.up", "output", "not.in.the.plan"])
        configs = yaml.safe_load(text)["configs"]
        found = {
            name: runs_in_megatron(configs[key], globally=globally)
            for name, key in chosen.items()
        }
        assert found == {"layers.1.up": runs, "output": None, "not.in.the.plan": None}

    def test_the_file_says_recipe_and_default(self) -> None:
        plan = plan_of(["layers.0.up", "layers.1.up"], ["output"], "blockwise")
        document = yaml.safe_load("\n".join(export_lines(plan, "megatron")))
        kind = {"transformer_engine_config_type": "TEQuantizationParams"}
        recipe = {
            "fp8_quantization_recipe": "blockwise",
            "fp8_format": "e4m3",
            "override_nonquantized_autocast": True,
        }
        assert document["configs"] == {
            "converted": {**kind, "training_recipe": recipe},
            "reference": {**kind, "training_recipe": {}},
        }
        patterns = [x["pattern"] for x in document["matchers"].values()]
        assert patterns == ["layers.*.up", "*"]

    def test_a_text_says_what_was_timed(self) -> None:
        lines = export_lines(plan_of(["up"], [], "tensorwise"), "megatron")
        assert "# timed: tensorwise of torchao, eager; not Transformer" in "\n".join(
            lines
        )

    def test_rowwise_is_none_of_its_recipes(self) -> None:
        with pytest.raises(ExportError, match="megatron knows tensorwise, blockwise"):
            export_lines(plan_of(*NAMES), "megatron")

    @settings(max_examples=200, deadline=None)
    @given(
        st.dictionaries(
            st.lists(
                st.sampled_from(["layers", "0", "1", "10", "wq", "w[1]", "w*", "mlp"]),
                min_size=1,
                max_size=5,
            ).map(".".join),
            st.booleans(),
            min_size=1,
            max_size=20,
        )
    )
    def test_the_order_of_matchers_chooses_the_plans_verdicts(
        self, wanted: dict[str, bool]
    ) -> None:
        converted = [x for x, yes in wanted.items() if yes]
        plan = plan_of(
            converted, [x for x in wanted if x not in converted], "blockwise"
        )
        text = "\n".join(export_lines(plan, "megatron"))
        assert self.chosen(text, list(wanted)) == {
            x: "converted" if yes else "reference" for x, yes in wanted.items()
        }


E, K, N = 4, 64, 96


class Experts(nn.Module):
    """Two grouped GEMMs and a router below them, of which nothing is to be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K) / 8)
        self.down = nn.Parameter(torch.randn(E, K, N) / 8)
        self.router = nn.Linear(K, E, bias=False)

    def forward(self, x: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        hidden = F.grouped_mm(x, self.up.transpose(-2, -1), offs=offs)
        return F.grouped_mm(hidden, self.down.transpose(-2, -1), offs=offs)


class Mixture(nn.Module):
    """A Linear before experts whose groups are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(K, K, bias=False)
        self.experts = Experts()
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offs = torch.tensor([3, 3, 20, len(x)], dtype=torch.int32)
        return self.experts(self.first(x), offs)


def mixture_plan(recipe: str, *, transposed: bool = False, bias: bool = False) -> Plan:
    def decided(fqn: str, k: int, n: int, experts: int, verdict: Verdict) -> Decision:
        shape = Shape(64, k, n, "bfloat16", "bfloat16", None, bias and not experts)
        shape = replace(shape, experts=experts, transposed=transposed and experts > 0)
        signature = Signature(shape, True, True, False)
        reason = Reason.FASTER if verdict is Verdict.CONVERTED else Reason.SLOWER
        name = recipe if verdict is Verdict.CONVERTED else None
        return Decision(
            fqn,
            k,
            n,
            verdict,
            reason,
            recipe=name,
            experts=experts,
            signatures=((signature, 1),),
        )

    yes, no = Verdict.CONVERTED, Verdict.REFERENCE
    decisions = (
        decided("first", K, K, 0, yes),
        decided("experts.up", K, N, E, yes),
        decided("experts.down", N, K, E, no),
        decided("experts.router", K, E, 0, no),
    )
    return Plan(decisions, recipe, "bfloat16", False, "eager", ())


def swapped(model: nn.Module) -> list[str]:
    named = model.named_parameters()
    return [x for x, y in named if type(y.data) not in (torch.Tensor, nn.Parameter)]


class TestExperts:
    @needs_mxfp8
    @pytest.mark.parametrize("recipe", MX_RECIPES)
    def test_mxfp8_computes_what_the_plan_applied_does(self, recipe: str) -> None:
        plan = mixture_plan(recipe)
        theirs, ours = Mixture(), Mixture()
        names: dict[str, Any] = {"model": theirs}
        exec("\n".join(export_lines(plan, "torchao")), names)  # noqa: S102
        assert swapped(theirs) == ["first.weight", "experts.up"]
        config = names["config"]
        config.kernel_preference = type(config.kernel_preference).EMULATED
        plan.apply(ours)
        x = torch.randn(64, K, dtype=torch.bfloat16)
        assert torch.equal(ours(x), theirs(x))
        assert not torch.equal(ours(x), Mixture()(x))

    def test_rowwise_converts_linears_and_swaps_experts(self) -> None:
        """That torchao pads nothing here is said."""
        model = Mixture()
        lines = export_lines(mixture_plan("rowwise"), "torchao")
        assert any("rows of each expert must be multiples of 16" in x for x in lines)
        exec("\n".join(lines), {"model": model})  # noqa: S102
        assert converted(model) == ["first"]
        assert swapped(model) == ["experts.up"]

    def test_experts_alone(self) -> None:
        plan = mixture_plan("rowwise")
        plan = replace(plan, decisions=plan.decisions[1:])
        lines = export_lines(plan, "torchao")
        assert not any("convert_to_float8_training" in x for x in lines)
        assert lines[-1] == "quantize_(model, FqnToConfig(configs), filter_fn=None)"

    def test_what_torchao_would_compute_otherwise_is_refused(self) -> None:
        with pytest.raises(ExportError, match=r"'first', a Linear with a bias, which"):
            export_lines(mixture_plan("mxfp8_rceil", bias=True), "torchao")
        with pytest.raises(ExportError, match=r"'experts\.up', experts whose matrices"):
            export_lines(mixture_plan("rowwise", transposed=True), "torchao")

    @needs_mxfp8
    def test_torchao_still_leaves_out_the_bias(self) -> None:
        """The day that it does not, a plan with one need not be refused."""
        linear = nn.Linear(K, K)
        expected = linear(torch.zeros(32, K))
        lines = export_lines(mixture_plan("mxfp8_rceil"), "torchao")
        model = nn.ModuleDict({"first": linear, "experts": Experts()})
        names: dict[str, Any] = {"model": model}
        exec("\n".join(lines), names)  # noqa: S102
        config = names["config"]
        config.kernel_preference = type(config.kernel_preference).EMULATED
        assert expected.any()
        assert not linear(torch.zeros(32, K)).any()

    @pytest.mark.parametrize("target", sorted(set(TARGETS) - {"torchao"}))
    def test_other_targets_say_that_they_know_modules_alone(self, target: str) -> None:
        with pytest.raises(
            ExportError, match=r"'experts\.up', a grouped GEMM of expert"
        ):
            export_lines(mixture_plan("rowwise"), target)
