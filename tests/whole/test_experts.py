"""Grouped GEMMs of experts are candidates like Linears: found, timed, decided, converted."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fp8tune import (
    AutoFloat8,
    ExportError,
    Plan,
    PlanMismatchError,
    Reason,
    TuneConfig,
    plan_ahead,
)
from fp8tune.decision.decide import reference_of
from fp8tune.decision.records import REFERENCE, Layer
from fp8tune.model.linears import named_gemms
from fp8tune.plan.export import TARGETS, export_lines
from fp8tune.recipes import BFloat16Linear, get_recipe
from fp8tune.recipes.bf16 import BFloat16Experts
from tests.conftest import ScriptedClock, WorkingClock
from tests.helpers import all_faster, graph_texts, hooks_of, signature

E, K, N, T = 4, 16, 32, 24


class Experts(nn.Module):
    """Two grouped GEMMs, K -> N -> K; rows are given to experts by the offsets."""

    def __init__(self, how=F.grouped_mm):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K) / 4)
        self.down = nn.Parameter(torch.randn(E, K, N) / 4)
        self.how = how

    def forward(self, x, offs):
        hidden = F.silu(self.how(x, self.up.transpose(-2, -1), offs=offs))
        return self.how(hidden, self.down.mT, offs=offs)


class Model(nn.Module):
    """A Linear, and experts that get its rows in a fixed order."""

    def __init__(self, offs=(3, 3, 20, T), experts=Experts):
        super().__init__()
        self.first = nn.Linear(K, K)
        self.experts = experts()
        self.offs = torch.tensor(offs, dtype=torch.int32)

    def forward(self, x):
        return self.experts(self.first(x), self.offs)


def low(x, weight, *, offs):
    """What BFloat16Experts computes, by hand."""
    return F.grouped_mm(x.bfloat16(), weight.bfloat16(), offs=offs).to(x.dtype)


def up_is_low(x, weight, *, offs):
    return (low if weight.shape[2] > weight.shape[1] else F.grouped_mm)(
        x, weight, offs=offs
    )


def model(**arguments):
    torch.manual_seed(0)
    return Model(**arguments)


def only_up(signature, variant):
    """Milliseconds: of all GEMMs only the experts' K -> N gains."""
    gains = signature.shape.experts and signature.shape.n > signature.shape.k
    return 1.0 if variant == REFERENCE else (0.5 if gains else 2.0)


def rows(seed=0):
    return torch.randn(T, K, generator=torch.Generator().manual_seed(seed))


def train(called, steps=3, forward=None):
    """Losses of some steps of SGD, and the gradients of the last."""
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = (forward or called)(rows(i)).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [x.grad for x in called.parameters()]


def tuned(module=None, recipe="bf16", clock=None, **options):
    auto = AutoFloat8(
        module or model(),
        recipe,
        warmup_steps=1,
        clock=clock or ScriptedClock(only_up),
        **options,
    )
    for i in range(2):
        auto(rows(i)).square().mean().backward()
        auto.zero_grad()
    assert auto.frozen
    return auto


def assert_same(found, expected):
    assert found[0] == expected[0]
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.equal(a, b)


def test_both_verdicts_among_the_gemms_of_one_module():
    auto = tuned(clock=WorkingClock(only_up))
    up, down = auto.plan["experts.up"], auto.plan["experts.down"]
    assert auto.plan.converted_fqns == ["experts.up"]
    assert (up.reason, down.reason) == (Reason.FASTER, Reason.SLOWER)
    assert (up.experts, up.k, up.n) == (E, K, N)
    assert (down.experts, down.k, down.n) == (E, N, K)
    ((signature, _),) = up.signatures
    shape = signature.shape
    assert (shape.m, shape.k, shape.n, shape.experts) == (T, K, N, E)
    assert signature.grad_input
    assert signature.grad_weight
    assert 40 < up.sqnr_db < 60
    assert "converted 1 of 3 GEMMs" in auto.plan.summary()


def test_the_table_and_the_page_say_how_many_experts(tmp_path):
    auto = tuned()
    heading, _, first, up, *_ = str(auto.plan).splitlines()
    assert heading.split()[:5] == ["layer", "M", "K", "N", "E"]
    assert first.split()[:6] == ["first", "24", "16", "16", "-", "1.000"]
    assert up.split()[:6] == ["experts.up", "24", "16", "32", "4", "1.000"]
    auto.report().to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"<th[^>]*>\s*(<[^>]*>)*E\b", page)


def test_training_is_bit_equal_to_calls_rerouted_by_hand():
    assert_same(train(tuned()), train(model(experts=partial(Experts, up_is_low))))


@pytest.mark.parametrize(
    ("offs", "count"),
    [
        ((0, 0, T, T), T),
        ((0, 0, 0, T), T),
        ((3, 10, 11, T), T),
        ((0, 1, 1, 1), 1),
        ((1, 1, 1, 1), 1),
    ],
    ids=["empty experts", "all in one", "unaligned", "one row", "one row in the first"],
)
def test_training_with_any_routing_is_bit_equal_to_calls_rerouted_by_hand(offs, count):
    def forward(called):
        return lambda x: called(x[:count])

    module = model(offs=offs)
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=WorkingClock(only_up))
    for i in range(2):
        auto(rows(i)[:count]).square().mean().backward()
        auto.zero_grad()
    assert auto.plan.converted_fqns == ["experts.up"]
    ((signature, _),) = auto.plan["experts.up"].signatures
    assert signature.shape.m == count
    by_hand = model(offs=offs, experts=partial(Experts, up_is_low))
    assert_same(
        train(module, forward=forward(module)), train(by_hand, forward=forward(by_hand))
    )


def test_keys_parameters_and_classes_stay():
    module = model()
    keys, parameters = list(module.state_dict()), list(module.parameters())
    auto = tuned(module)
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert isinstance(module.experts, Experts)
    assert type(module.experts).__name__ == "Experts"
    assert not hooks_of(module)
    auto.abandon()
    assert type(module.experts) is Experts
    assert vars(module.experts).keys() == vars(model().experts).keys()
    assert_same(train(module), train(model()))


def test_inside_of_reference_all_run_in_high_precision():
    auto = tuned()
    with auto.reference():
        assert type(auto.module.experts) is Experts
        assert torch.equal(auto(rows()), model()(rows()))
    assert not torch.equal(auto(rows()), model()(rows()))


def test_the_compiled_graph_has_the_rerouted_gemm():
    """Dynamo passes torch._grouped_mm by function modes unless told otherwise."""
    pytest.importorskip("transformers.integrations.moe")
    module = tuned(model(experts=partial(Experts, operator))).module
    eager = module(rows())

    def run(backend):
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        assert torch.equal(compiled(rows()), eager)

    (text,) = graph_texts(run)
    assert text.count("= torch._grouped_mm(") == 1
    assert text.count("grouped_mm_fallback(") == 1


def test_what_is_compiled_is_what_was_chosen():
    pytest.importorskip("transformers.integrations.moe")
    torch._dynamo.reset()
    options = {"backend": "eager", "fullgraph": True}
    module = model(experts=partial(Experts, operator))
    auto = tuned(module, compile=options, config=TuneConfig(trial_steps=0))
    assert auto.plan.converted_fqns == ["experts.up"]
    by_hand = model(experts=partial(Experts, up_is_low))
    assert torch.equal(auto(rows()), by_hand(rows()))


def operator(x, weight, *, offs):
    """Transformers' own, which it calls where a compiler refuses float32."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)


ROUTINGS = {
    "empty experts": (0, 0, T, T),
    "all rows in the last": (0, 0, 0, T),
    "unaligned": (3, 10, 11, T),
    "rows that belong to nobody": (3, 10, 11, T - 5),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_any_routing_is_timed_and_compared_with_float64(routing):
    module = model(offs=ROUTINGS[routing])
    clock = WorkingClock(only_up)
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=clock)
    seen = {}
    handle = module.experts.register_forward_hook(
        lambda _, args, __: seen.update(x=args[0].detach(), offs=args[1])
    )
    auto(rows()).nan_to_num().square().mean().backward()
    handle.remove()
    up = module.experts.up.detach()
    auto(rows())
    exact = grouped_in_float64(seen["x"], up, seen["offs"])
    found = low(seen["x"], up.mT, offs=seen["offs"]).double()[: seen["offs"][-1]]
    noise = (exact - found).square().sum()
    decibels = 10 * torch.log10(exact.square().sum() / noise).item()
    run = auto.tuner._pipeline.run
    (measured,) = [x for x in run.measurements if x.signature.shape.n == N]
    assert measured.accuracy.output_db == pytest.approx(decibels, abs=0.05)
    assert measured.accuracy.grad_weight_db > 40


def grouped_in_float64(x, up, offs):
    starts = [0, *offs.tolist()[:-1]]
    pairs = zip(starts, offs.tolist(), strict=True)
    return torch.cat(
        [x[a:b].double() @ up[i].double().t() for i, (a, b) in enumerate(pairs)]
    )


def test_one_row_and_no_rows():
    module = model(offs=(0, 0, 1, 1))
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=WorkingClock(only_up))
    for _ in range(2):
        auto(rows()[:1]).square().mean().backward()
    assert auto.plan.converted_fqns == ["experts.up"]
    module.offs.zero_()
    assert auto(rows()[:0]).shape == (0, K)


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own


@pytest.mark.parametrize("phase", ["warmup", "frozen"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_and_pickles(phase, copied):
    auto = tuned() if phase == "frozen" else AutoFloat8(model(), "bf16", warmup_steps=1)
    twin = copied(auto.module)
    expected = auto.module if phase == "frozen" else model()
    assert torch.equal(twin(rows()), expected(rows()))
    assert (type(twin.experts) is Experts) == (phase == "warmup")
    with torch.no_grad():  # a copy multiplies by its own weights
        twin.experts.up.zero_()
    assert not twin(rows()).any()
    assert expected(rows()).any()
    whole = copied(auto)
    whole.abandon()
    assert type(whole.module.experts) is Experts


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def forward(called):
        return lambda x: checkpoint(called, x.requires_grad_(), use_reentrant=reentrant)

    module = model()
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=ScriptedClock(only_up))
    for i in range(2):
        forward(module)(rows(i)).square().mean().backward()
        module.zero_grad()
    if not auto.frozen:
        auto.freeze()
    assert auto.plan.converted_fqns == ["experts.up"]
    assert auto.plan["experts.up"].signatures[0][0].recompute
    by_hand = model(experts=partial(Experts, up_is_low))
    assert_same(
        train(module, forward=forward(module)), train(by_hand, forward=forward(by_hand))
    )


class Checkpointed(Experts):
    """Checkpoints a part of its own forward: a method, or a function without a name."""

    part = "method"
    kwargs: ClassVar = {"use_reentrant": False}

    def inner(self, x, offs):
        hidden = F.silu(self.how(x, self.up.transpose(-2, -1), offs=offs))
        return self.how(hidden, self.down.mT, offs=offs)

    def forward(self, x, offs):
        part = self.inner if self.part == "method" else lambda x: self.inner(x, offs)
        arguments = (x, offs) if self.part == "method" else (x,)
        return checkpoint(part, *arguments, **self.kwargs)


@pytest.mark.parametrize("options", [{}, {"early_stop": False}])
@pytest.mark.parametrize("part", ["method", "lambda"])
def test_checkpointing_inside_of_the_modules_own_forward(options, part):
    """What backward repeats is rerouted too, else torch finds other tensors and raises."""

    class Kind(Checkpointed):
        pass

    Kind.part, Kind.kwargs = part, {"use_reentrant": False, **options}
    auto = tuned(model(experts=Kind))
    assert auto.plan.converted_fqns == ["experts.up"]
    assert auto.plan["experts.up"].signatures[0][0].recompute
    by_hand = model(experts=partial(Kind, up_is_low))
    assert_same(train(auto), train(by_hand))


def test_both_checkpoints_of_one_forward_are_repeated():
    class Twice(Checkpointed):
        def forward(self, x, offs):
            return super().forward(x, offs) + super().forward(2 * x, offs)

    auto = tuned(model(experts=Twice))
    assert_same(train(auto), train(model(experts=partial(Twice, up_is_low))))


def test_a_checkpoint_inside_of_a_checkpoint_around_the_module():
    def forward(called):
        return lambda x: checkpoint(called, x, use_reentrant=False)

    auto = tuned(model(experts=Checkpointed))
    by_hand = model(experts=partial(Checkpointed, up_is_low))
    assert_same(
        train(auto, forward=forward(auto)), train(by_hand, forward=forward(by_hand))
    )


def test_accumulation_and_autocast():
    def forward(called):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return torch.stack([called(x), called(x)])

        return run

    class Casting(Experts):
        """As Transformers does: rows in the dtype of the weights."""

        def forward(self, x, offs):
            return super().forward(x.to(self.up.dtype), offs)

    module = model(experts=Casting)
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=ScriptedClock(only_up))
    for i in range(2):
        forward(auto)(rows(i)).square().mean().backward()
        auto.zero_grad()
    assert auto.plan.converted_fqns == ["experts.up"]
    ((signature, calls),) = auto.plan["experts.up"].signatures
    assert (calls, signature.shape.autocast_dtype) == (2, "bfloat16")
    by_hand = model(experts=partial(Casting, up_is_low))
    assert_same(
        train(module, forward=forward(module)), train(by_hand, forward=forward(by_hand))
    )


def test_what_never_calls_a_grouped_gemm_is_said():
    class Loop(Experts):
        def forward(self, x, offs):
            del offs
            return x @ self.up[0].t() @ self.down[0].t()

    auto = tuned(model(experts=Loop))
    assert auto.plan["experts.up"].reason is Reason.NO_GROUPED_GEMM
    assert type(auto.module.experts) is Loop


def test_a_recipe_that_takes_linears_says_so():
    auto = tuned(recipe="rowwise", config=TuneConfig(static_filter="divisible"))
    assert auto.plan["experts.up"].reason is Reason.NOT_FOR_EXPERTS
    assert type(auto.module.experts) is Experts


def test_one_of_several_recipes_takes_them():
    auto = tuned(recipe=["rowwise", "bf16"], clock=ScriptedClock(only_up))
    assert auto.plan["experts.up"].recipe == "bf16"


def test_experts_are_left_out_by_name():
    auto = tuned(filter_fqns=["experts.down"])
    assert auto.plan["experts.down"].reason is Reason.FILTERED_BY_NAME


def test_parameters_that_are_no_experts_are_not_mentioned():
    class Other(Model):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, T, K))
            self.convolution = nn.Conv1d(4, 4, 3)

        def forward(self, x):
            return super().forward(x + self.positions[0])

    plan = tuned(Other()).plan
    assert [x.fqn for x in plan.decisions] == ["first", "experts.up", "experts.down"]


def test_a_plan_is_applied_reverted_saved_and_refused(tmp_path):
    auto = tuned()
    auto.plan.save(tmp_path / "plan.json")
    plan, other = Plan.load(tmp_path / "plan.json"), model()
    assert plan == auto.plan
    plan.apply(other)
    assert torch.equal(other(rows()), auto(rows()))
    plan.revert(other)
    assert type(other.experts) is Experts
    other.experts.up = nn.Parameter(torch.zeros(E + 1, N, K))
    with pytest.raises(
        PlanMismatchError, match=r"E, K, N = \(5, 16, 32\), in the plan \(4, "
    ):
        plan.apply(other)


def test_a_plan_from_before_experts_were_tuned_leaves_them_alone():
    plan, whole = tuned(clock=ScriptedClock(all_faster)).plan, model()
    old = replace(plan, decisions=plan.decisions[:1])
    old.apply(whole)
    assert isinstance(whole.first, BFloat16Linear)
    assert type(whole.experts) is Experts


@pytest.mark.parametrize("target", sorted(set(TARGETS) - {"torchao"}))
def test_an_export_says_that_it_cannot_express_experts(target):
    plan = tuned().plan
    with pytest.raises(ExportError, match=r"'experts\.up', a grouped GEMM.*to torchao"):
        export_lines(plan, target)


def test_torchao_has_no_bfloat16_in_a_float32_model():
    with pytest.raises(
        ExportError, match=r"recipe 'bf16', and torchao knows tensorwis"
    ):
        export_lines(tuned().plan, "torchao")


def test_experts_that_stay_need_no_word_in_an_export():
    every = TuneConfig(static_filter="divisible")
    clock = ScriptedClock(all_faster)
    plan = tuned(recipe="rowwise", clock=clock, config=every).plan
    assert plan.converted_fqns == ["first"]
    lines = [x for x in export_lines(plan, "torchtitan") if x[0] != "#"]
    assert not any("experts" in x for x in lines)


def test_a_later_run_is_decided_by_the_cache(tmp_path, silent_clock):
    plan = tuned(cache=tmp_path / "cache.json").plan
    again = AutoFloat8(
        model(), "bf16", cache=tmp_path / "cache.json", clock=silent_clock
    )
    assert again.plan.decisions == plan.decisions
    for i in range(2):
        again(rows(i)).square().mean().backward()
    assert again.phase == "frozen"


@pytest.mark.parametrize("says", [True, False])
def test_matrices_that_lie_the_other_way_round(says, tmp_path):
    """Which size is K is what was multiplied, whether the owner says it or not."""

    class Transposed(Experts):
        """(E, K, N), as in gpt-oss."""

        is_transposed = says

        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(E, K, N) / 4)
            self.down = nn.Parameter(torch.randn(E, N, K) / 4)

        def forward(self, x, offs):
            hidden = F.silu(F.grouped_mm(x, self.up, offs=offs))
            return F.grouped_mm(hidden, self.down, offs=offs)

    cache = {"cache": tmp_path / "cache.json"}
    auto = tuned(model(experts=Transposed), clock=WorkingClock(only_up), **cache)
    up, down = auto.plan["experts.up"], auto.plan["experts.down"]
    assert (up.k, up.n, up.signatures[0][0].shape.transposed) == (K, N, True)
    assert (down.k, down.n, down.experts) == (N, K, E)
    assert auto.plan.converted_fqns == ["experts.up"]
    assert up.sqnr_db > 40
    other = model(experts=Transposed)  # which nobody has called
    auto.plan.apply(other)
    assert torch.equal(other(rows()), auto(rows()))
    again = AutoFloat8(model(experts=Transposed), "bf16", **cache)
    assert again.plan.decisions == auto.plan.decisions


def test_a_tensor_parallel_part_of_a_matrix_tells_its_order_too():
    part = replace(signature(T, K, N // 4).shape, experts=E)
    calls = ((replace(signature(T, K, N // 4), shape=part), 1),)
    named = Layer("up", N, K, "float32", True, Reason.FILTERED_BY_NAME, calls, (), E)
    decision = reference_of(named)
    assert (decision.k, decision.n, decision.experts) == (K, N, E)
    other = reference_of(replace(named, k=K, n=N))
    assert (other.k, other.n) == (K, N)
    never = reference_of(replace(named, calls=()))
    assert (never.k, never.n) == (N, K)  # as the owner says it


def test_weights_that_are_cast_before_each_call():
    """torchtitan's experts multiply bfloat16 casts of float32 weights."""
    torchtitan = pytest.importorskip("torchtitan.models.common.moe")
    config = torchtitan.GroupedExperts.Config(dim=K, hidden_dim=N, num_experts=E)

    class Titan(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torchtitan.GroupedExperts(config)
            for x in self.experts.parameters():
                nn.init.normal_(x, std=0.1)

        def forward(self, x):
            return self.experts(x, torch.tensor([3, 0, 17, 4]))

    auto = tuned(Titan(), clock=WorkingClock(only_up))
    assert [x.fqn for x in auto.plan.decisions] == [
        f"experts.{x}" for x in ("w1_EFD", "w2_EDF", "w3_EFD")
    ]
    assert auto.plan.converted_fqns == ["experts.w1_EFD", "experts.w3_EFD"]
    shape = auto.plan["experts.w1_EFD"].signatures[0][0].shape
    assert (shape.weight_dtype, shape.m, shape.k, shape.n) == ("bfloat16", T, K, N)


FAMILIES = {
    "Mixtral": {"num_local_experts": E, "intermediate_size": 48},
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 48},
    "DeepseekV3": {
        "n_routed_experts": E,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GptOss": {"num_local_experts": E, "intermediate_size": 48, "head_dim": 8},
}


def language_model(family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=2,
        attn_implementation="eager",
        **FAMILIES[family],
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers(family, monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    ids = torch.arange(32).reshape(2, 16)

    def forward(called):
        return lambda _: called(ids).logits

    module = language_model(family)
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=ScriptedClock(only_up))
    for _ in range(2):
        forward(auto)(None).square().mean().backward()
        auto.zero_grad()
    experts = "model.layers.0.mlp.experts"
    assert auto.plan.converted_fqns == [f"{experts}.gate_up_proj"]
    assert auto.plan[f"{experts}.down_proj"].reason is Reason.SLOWER
    assert "experts" not in dict(auto.plan.coverage.rest)
    found = train(module, 2, forward(module))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    assert torch.equal(compiled(ids).logits, module(ids).logits)
    monkeypatch.setattr(
        moe, "_grouped_mm", lambda x, weight, offs: up_is_low(x, weight, offs=offs)
    )
    by_hand = language_model(family)
    assert_same(found, train(by_hand, 2, forward(by_hand)))


def sharded_by_fsdp():
    """A part of the experts on each rank at rest, all of them in the GEMM."""
    mesh = init_device_mesh("cpu", (2,))
    module = model()
    fully_shard(module.experts, mesh=mesh)
    fully_shard(module, mesh=mesh)
    auto = tuned(module)
    after = module(rows()).detach()
    fully = fully_shard(tuned(model()).module, mesh=mesh)  # the other way round
    shape = auto.plan["experts.up"].signatures[0][0].shape
    same = torch.equal(after, fully(rows()).detach())
    auto.abandon()
    plain = torch.equal(module(rows()).detach(), model()(rows()).detach())
    name = type(module.experts).__name__
    return auto.plan is None, shape.experts, shape.m, same, plain, name


def test_fsdp2_gathers_what_is_multiplied(ranks):
    expected = (True, E, T, True, True, "FSDPExperts")
    assert ranks(2, sharded_by_fsdp, seconds=90) == {0: expected, 1: expected}


class Local(Experts):
    """Multiplies the experts that are on this rank, as torchtitan does."""

    def forward(self, x, offs):
        up, down = self.up.to_local(), self.down.to_local()
        hidden = F.silu(self.how(x, up.transpose(-2, -1), offs=offs))
        return self.how(hidden, down.transpose(-2, -1), offs=offs)


def parallel_experts():
    mesh = init_device_mesh("cpu", (2,))
    module = model(experts=Local)
    for name, x in list(module.experts.named_parameters()):
        local = x.detach().chunk(2)[mesh.get_rank()].clone()
        whole = DTensor.from_local(local, mesh, [Shard(0)])
        setattr(module.experts, name, nn.Parameter(whole))
    rank = mesh.get_rank()
    module.offs = torch.tensor([5 + rank, T], dtype=torch.int32)
    module.first.requires_grad_(False)
    auto = tuned(module, clock=WorkingClock(only_up))
    up = auto.plan["experts.up"]
    return (
        up.experts,
        up.signatures[0][0].shape.experts,
        tuple(auto.plan.converted_fqns),
    )


def test_expert_parallelism_times_the_local_experts(ranks):
    expected = (E, E // 2, ("experts.up",))
    assert ranks(2, parallel_experts, seconds=90) == {0: expected, 1: expected}


def test_decided_before_the_first_step():
    auto = AutoFloat8(model(), "bf16", warmup_steps=0, clock=ScriptedClock(only_up))
    auto(rows()).square().mean().backward()
    assert auto.plan.converted_fqns == ["experts.up"]
    assert auto.plan["experts.down"].reason is Reason.SLOWER


def test_a_plan_ahead_has_them():
    clock = ScriptedClock(only_up)
    plan = plan_ahead(Model, rows(), recipe="bf16", device="cpu", clock=clock)
    assert plan.converted_fqns == ["experts.up"]
    ((signature, _),) = plan["experts.up"].signatures
    assert (signature.shape.m, signature.shape.experts) == (T, E)


def test_a_converted_handle_is_shown_with_its_sizes():
    recipe, module = get_recipe("bf16", "cpu"), model()
    gemm = dict(named_gemms(module))["experts.up"]
    recipe.convert(gemm)
    assert isinstance(gemm, BFloat16Experts)
    assert repr(gemm) == "BFloat16Experts(experts=4, in_features=16, out_features=32)"
