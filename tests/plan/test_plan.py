"""The plan: looking up, applying to another model, as a filter, as a file."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from fp8tune.auto import AutoFloat8
from fp8tune.config import TuneConfig
from fp8tune.decision.reasons import Reason
from fp8tune.decision.records import (
    REFERENCE,
    Decision,
    Layer,
    Shape,
    Signature,
    Verdict,
)
from fp8tune.errors import (
    CacheError,
    Fp8TuneError,
    PlanMismatchError,
    UnknownRecipeError,
)
from fp8tune.plan.plan import PLAN_VERSION, Plan
from fp8tune.recipes import get_recipe

EVERY_SIZE = TuneConfig(static_filter="divisible")


@dataclass
class LinearConfig:
    """What frameworks pass that decide before there are modules."""

    in_features: int
    out_features: int


class Block(nn.Module):
    """Three Linears of different shapes and one that is used by nobody."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.head = nn.Linear(16, 32)
        self.unused = nn.Linear(16, 16)

    def forward(self, input):
        return self.head(self.down(self.up(input)))


def decision(fqn, reason=Reason.FASTER, k=16, n=64):
    converted = reason is Reason.FASTER
    verdict = Verdict.CONVERTED if converted else Verdict.REFERENCE
    recipe = "rowwise" if converted else None
    return Decision(fqn, k, n, verdict, reason, recipe=recipe)


def plan_of(*decisions, recipe="rowwise", emulated=False):
    environment = (("device", "Imaginary 1000"), ("torch", "2.13.0"))
    return Plan(decisions, recipe, "bfloat16", emulated, "eager", environment)


PLAN = plan_of(
    decision("up"),
    decision("down", Reason.SLOWER, 64, 16),
    decision("head", Reason.FASTER, 16, 32),
    decision("unused", Reason.NEVER_CALLED, 16, 16),
)


def script(signature, variant):
    """Widening layers gain, the others lose."""
    gain = 2.0 if signature.shape.n > signature.shape.k else 0.5
    return gain if variant == REFERENCE else 1.0


def tuned(clock, recipe="rowwise"):
    """A model that was tuned by a scripted clock, and its plan."""
    model = Block()
    auto = AutoFloat8(model, recipe, config=EVERY_SIZE, clock=clock)
    auto(torch.randn(4, 16)).sum().backward()
    return model, auto.freeze()


def types(model):
    return {name: type(child) for name, child in model.named_modules()}


def names_of_types(model):
    return {name: kind.__name__ for name, kind in types(model).items()}


def saved(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.json"


def test_a_decision_is_found_by_name():
    assert PLAN["down"] is PLAN.decisions[1]
    assert PLAN["_orig_mod.down"] is PLAN.decisions[1]


def test_an_unknown_name_is_said():
    with pytest.raises(KeyError, match="no Linear 'sideways' in this plan of 4"):
        PLAN["sideways"]


def test_names_are_sorted_out_by_verdict_in_model_order():
    assert PLAN.converted_fqns == ["up", "head"]
    assert PLAN.reference_fqns == ["down", "unused"]


def test_the_summary_counts_the_reasons():
    slower = [decision(f"layers.{i}.wk", Reason.SLOWER) for i in range(3)]
    plan = plan_of(decision("wq"), *slower)
    expected = "converted 1 of 4 Linears to rowwise; not converted: 3 slower"
    assert plan.summary() == expected


def test_the_summary_of_a_full_conversion_gives_no_reasons():
    assert plan_of(decision("wq")).summary() == "converted 1 of 1 Linears to rowwise"


def test_the_summary_says_that_gemms_were_emulated():
    plan = plan_of(decision("wq"), emulated=True)
    assert plan.summary() == "converted 1 of 1 Linears to rowwise (emulated)"


def test_the_text_of_a_plan_ends_in_a_summary():
    assert PLAN.summary() in str(PLAN).splitlines()


@pytest.mark.parametrize("recipe", ["rowwise", "bf16"])
def test_a_fresh_model_becomes_what_was_tuned(scripted_clock, recipe):
    model, plan = tuned(scripted_clock(script), recipe)
    assert plan.converted_fqns == ["up", "head"]
    fresh = Block()
    plan.apply(fresh)
    assert types(fresh) == types(model)
    fresh.load_state_dict(model.state_dict())
    input = torch.randn(4, 16)
    assert torch.equal(fresh(input), model(input))


def test_a_plan_applies_to_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = Block()
    PLAN.apply(model)
    assert type(model.up).__name__ == "Float8Linear"
    assert type(model.down) is nn.Linear


def test_a_plan_applies_to_a_model_with_checkpointed_blocks():
    plan = plan_of(decision("block.up"), decision("block.down", k=64, n=16))
    block = nn.ModuleDict({"up": nn.Linear(16, 64), "down": nn.Linear(64, 16)})
    plan.apply(nn.ModuleDict({"block": checkpoint_wrapper(block)}))
    assert [type(x).__name__ for x in block.values()] == ["Float8Linear"] * 2


def test_a_missing_an_extra_and_another_layer_are_named():
    model = Block()
    del model.unused
    model.extra = nn.Linear(16, 16)
    model.up = nn.Linear(32, 64)
    expected = (
        r"extra is only in the model; unused is only in the plan; "
        r"up has K, N = \(32, 64\), in the plan \(16, 64\)\. Tune this model"
    )
    with pytest.raises(PlanMismatchError, match=expected):
        PLAN.apply(model)


def test_a_model_that_does_not_fit_stays_as_it_is():
    model = Block()
    model.extra = nn.Linear(16, 16)
    before = types(model)
    with pytest.raises(PlanMismatchError, match="extra is only in the model"):
        PLAN.apply(model)
    assert types(model) == before


def test_a_layer_that_cannot_be_converted_is_named_before_anything_changes():
    model = Block()
    convert_to_float8_training(model, module_filter_fn=lambda _, fqn: fqn == "head")
    before = types(model)
    with pytest.raises(Fp8TuneError, match="head"):
        PLAN.apply(model)
    assert types(model) == before


@pytest.mark.parametrize(("number", "end"), [(5, ""), (6, "; and 1 more")])
def test_five_differences_are_named_and_the_rest_counted(number, end):
    model = Block()
    for i in range(number):
        setattr(model, f"x{i}", nn.Linear(1, 1))
    expected = rf"x3 is only in the model; x4 is only in the model{end}\. Tune"
    with pytest.raises(PlanMismatchError, match=expected):
        PLAN.apply(model)


def test_a_recipe_that_is_not_registered_must_be_given():
    plan = plan_of(decision("up"), recipe="custom")
    model = nn.ModuleDict({"up": nn.Linear(16, 64)})
    with pytest.raises(UnknownRecipeError, match="unknown recipe 'custom'"):
        plan.apply(model)
    plan.apply(model, recipe=get_recipe("tensorwise", "cpu"))
    assert type(model["up"]).__name__ == "Float8Linear"


def test_a_plan_without_conversions_needs_no_recipe():
    plan = plan_of(decision("up", Reason.SLOWER), recipe="custom")
    model = nn.ModuleDict({"up": nn.Linear(16, 64)})
    plan.apply(model)
    assert type(model["up"]) is nn.Linear


def test_torchao_takes_the_filter():
    model, applied = Block(), Block()
    convert_to_float8_training(model, module_filter_fn=PLAN.module_filter_fn)
    PLAN.apply(applied)
    assert names_of_types(model) == names_of_types(applied)


@pytest.mark.parametrize(
    ("fqn", "k", "n", "expected"),
    [
        ("up", 16, 64, True),
        ("_orig_mod.up", 16, 64, True),
        ("down", 64, 16, False),
        ("unknown", 16, 64, False),
        ("up", 32, 64, False),
        ("up", 16, 32, False),
    ],
)
@pytest.mark.parametrize("kind", [LinearConfig, nn.Linear])
def test_the_filter_takes_modules_and_configs(kind, fqn, k, n, expected):
    assert PLAN.module_filter_fn(kind(k, n), fqn) is expected


def test_the_filter_leaves_out_what_is_no_linear():
    assert PLAN.module_filter_fn(nn.LayerNorm(16), "up") is False


def test_a_plan_comes_back_from_its_file(path):
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert Plan.load(str(path)) == PLAN


def test_a_tuned_plan_comes_back_from_its_file(path, scripted_clock):
    _, plan = tuned(scripted_clock(script))
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert str(loaded) == str(plan)


@pytest.mark.parametrize("text", ["", "{", "plan", '{"format": "fp8tune-plan"', "\0"])
def test_a_file_that_is_no_json_is_refused(path, text):
    with pytest.raises(CacheError, match=r"plan\.json is no JSON"):
        Plan.load(saved(path, text))


def test_half_a_file_is_refused(path):
    PLAN.save(path)
    text = path.read_text()
    with pytest.raises(CacheError, match=r"plan\.json is no JSON"):
        Plan.load(saved(path, text[: len(text) // 2]))


def test_json_nested_too_deep_is_refused(path):
    with pytest.raises(CacheError, match=r"plan\.json"):
        Plan.load(saved(path, "[" * 100_000))


def test_bytes_that_are_no_text_are_refused(path):
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CacheError, match=r"plan\.json is no JSON"):
        Plan.load(path)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "fp8tune-plan",
        {},
        {"format": "fp8tune-cache", "version": PLAN_VERSION},
        ["fp8tune-plan", PLAN_VERSION],
    ],
)
def test_json_that_is_no_plan_is_refused(path, data):
    expected = rf"expected \('fp8tune-plan', {PLAN_VERSION}\)"
    with pytest.raises(CacheError, match=expected):
        Plan.load(saved(path, json.dumps(data)))


def test_a_newer_version_is_refused(path):
    PLAN.save(path)
    data = json.loads(path.read_text()) | {"version": PLAN_VERSION + 1}
    with pytest.raises(CacheError, match=rf"\('fp8tune-plan', {PLAN_VERSION + 1}\)"):
        Plan.load(saved(path, json.dumps(data)))


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_a_plan_of_an_older_version_is_read(version):
    plan = Plan.load(Path(__file__).parents[1] / "data" / f"plan-v{version}.json")
    assert plan.converted_fqns == ["layers.0.wq", "layers.0.w1"]
    wq = plan["layers.0.wq"]
    assert wq.candidate_ms == pytest.approx(0.8433, abs=1e-4)
    assert (wq.candidate_bytes, wq.variants[0].candidate_bytes) == (524288, 524288)
    assert plan["layers.0.wk"].reason is Reason.SLOWER
    assert (wq.timed_m, wq.shared_by) == ((2048,), 1)
    assert [x.layers for x in plan.trials] == [2, 0]
    assert plan.trial.converted == tuple(plan.converted_fqns)
    assert bool(plan.trial.steps.ms) == (version >= 4)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("content", [None, [], {"decisions": []}])
def test_a_plan_with_damaged_contents_is_refused(path, content):
    data = {"format": "fp8tune-plan", "version": PLAN_VERSION, "plan": content}
    with pytest.raises(CacheError, match="plan: found"):
        Plan.load(saved(path, json.dumps(data)))


def test_a_damaged_decision_is_named(path):
    PLAN.save(path)
    text = path.read_text().replace('"slower"', '"slow"')
    with pytest.raises(CacheError, match=r"plan\.decisions\[1\]\.reason: found 'slow'"):
        Plan.load(saved(path, text))


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        Plan.load(path)


def test_a_plan_keeps_what_its_layers_were_called_with(path):
    shape = Shape(4096, 16, 64, "bfloat16", "float32", "bfloat16", True)
    signature = Signature(shape, True, True, False, recompute=True)
    layer = Layer("up", 16, 64, "float32", True, None, ((signature, 3),))
    kept = Decision(
        "up",
        16,
        64,
        Verdict.CONVERTED,
        Reason.FASTER,
        recipe="rowwise",
        signatures=layer.calls,
        reference_ms=1.5,
        candidate_ms=1.25,
        speedup=1.2,
        speedup_low=1.1,
        samples=16,
    )
    plan_of(kept).save(path)
    assert Plan.load(path)["up"] == kept


def test_a_config_that_gathers_in_float8_is_said_not_to_be_applied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = Plan((), "tensorwise", "bfloat16", False, "eager", ())
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
    plan.apply(nn.Sequential(), recipe=config)
    assert "weights are gathered in high precision" in caplog.text
