"""The report's last line: what candidates are of a step's matrix products."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fp8tune import AutoFloat8, Plan, TuneConfig

transformers = pytest.importorskip("transformers")

B, S = 2, 16


def tuned(model, step, clock, recipe="bf16", **options):
    auto = AutoFloat8(model, recipe, warmup_steps=1, clock=clock, **options)
    for _ in range(2):
        step(auto).backward()
        auto.zero_grad()
    assert auto.frozen
    return auto


@pytest.fixture
def clock(scripted_clock):
    return scripted_clock(lambda signature, variant: 1.0)


def language_model(kind, head="ForCausalLM", **sizes):
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **sizes)
    model = getattr(transformers, f"{kind}{head}")(config)
    return model, lambda auto: auto(torch.ones(B, S, dtype=torch.long)).logits.sum()


def gemm(m, k, n, *, gradients=2):
    """FLOPs of forward and of so many products of its backward."""
    return 2 * m * k * n * (1 + gradients)


def attention(heads, size, rows=S):
    return int(3.5 * 2 * 2 * B * heads * rows * rows * size)


def test_llama(clock):
    model, step = language_model(
        "Llama",
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    coverage = tuned(model, step, clock).plan.coverage
    q, kv, mlp = gemm(B * S, 32, 32), gemm(B * S, 32, 16), gemm(B * S, 32, 96)
    assert coverage.candidates == 2 * (2 * q + 2 * kv + 3 * mlp)
    assert dict(coverage.rest) == {
        "Linears left out": gemm(B * S, 32, 64),
        "attention": 2 * attention(4, 8),
    }


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_mixtral(clock, experts):
    model, step = language_model(
        "Mixtral",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation=experts,
    )
    coverage = tuned(model, step, clock).plan.coverage
    rows = 2 * B * S  # two experts for each token
    in_experts = gemm(rows, 32, 2 * 48) + gemm(rows, 48, 32)
    grouped = experts == "grouped_mm"
    attended = 2 * gemm(B * S, 32, 32) + 2 * gemm(B * S, 32, 16)
    assert coverage.candidates == attended + (in_experts if grouped else 0)
    assert dict(coverage.rest) == {
        **({} if grouped else {"experts": in_experts}),
        "Linears left out": gemm(B * S, 32, 64),
        "attention": attention(4, 8),
        "MixtralTopKRouter": gemm(B * S, 32, 4),
    }


@pytest.mark.parametrize(
    ("recipe", "experts"), [("rowwise", "grouped_mm"), ("bf16", "eager")]
)
def test_experts_that_are_not_tuned_are_a_warning(clock, caplog, recipe, experts):
    model, step = language_model(
        "Qwen3Moe",
        hidden_size=32,
        moe_intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation=experts,
    )
    every = TuneConfig(static_filter="divisible")
    coverage = tuned(model, step, clock, recipe, config=every).plan.coverage
    share = 100 * dict(coverage.rest)["experts"] / coverage.total
    (line,) = [x for x in caplog.messages if x.startswith("experts have")]
    assert f"{share:.1f}% of a step's GEMM FLOPs and are not tuned" in line


def test_no_experts_no_warning(clock, caplog):
    tuned(nn.Linear(32, 32), lambda auto: auto(torch.ones(8, 32)).sum(), clock)
    assert "experts" not in caplog.text


def test_vit(clock):
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=8,
    )
    model = transformers.ViTForImageClassification(config)
    image = torch.ones(B, 3, 16, 16)
    coverage = tuned(model, lambda auto: auto(image).logits.sum(), clock).plan.coverage
    patches, rows = 16, B * 17  # and the class token
    assert coverage.candidates == (
        4 * gemm(rows, 32, 32) + 2 * gemm(rows, 32, 64) + gemm(B, 32, 8)
    )
    assert dict(coverage.rest) == {
        "convolutions": gemm(B * patches, 3 * 4 * 4, 32, gradients=1),
        "attention": attention(4, 8, rows=17),
    }


@pytest.mark.parametrize("written_out", ["sdpa", "eager"])
def test_gpt2(clock, written_out):
    model, step = language_model(
        "GPT2",
        "LMHeadModel",
        n_embd=32,
        n_head=4,
        n_layer=1,
        n_positions=S,
        attn_pdrop=0.0,  # fused attention has no dropout on a CPU
        tie_word_embeddings=False,
        attn_implementation=written_out,
    )
    auto = tuned(model, step, clock, config=TuneConfig(include_output_layer=True))
    coverage = auto.plan.coverage
    conv1d = gemm(B * S, 32, 96) + gemm(B * S, 32, 32) + 2 * gemm(B * S, 32, 128)
    backward = 3.5 if written_out == "sdpa" else 3  # fused, one product is repeated
    assert coverage.candidates == gemm(B * S, 32, 64)
    assert dict(coverage.rest) == {
        "Conv1D": conv1d,
        "attention": int(backward * 2 * 2 * B * 4 * S * S * 8),
    }
    share = conv1d / coverage.total
    assert f"{100 * share:.1f}% Conv1D" in auto.report().splitlines()[-1]


class Block(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.own = nn.Parameter(torch.randn(32, 32))
        self.how = how

    def inner(self, x):
        return F.relu(self.second(self.first(x) @ self.own))

    def forward(self, x):
        if self.how is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.how == "reentrant")


@pytest.mark.parametrize("how", [None, "reentrant", "not reentrant"])
def test_checkpointing_counts_nothing_twice(clock, how):
    x = torch.randn(8, 32, requires_grad=True)
    auto = tuned(nn.Sequential(Block(how)), lambda auto: auto(x).sum(), clock)
    assert auto.plan.coverage.candidates == 2 * gemm(8, 32, 32)
    assert dict(auto.plan.coverage.rest) == {"Block": gemm(8, 32, 32)}


class CompiledInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.own = nn.Parameter(torch.randn(32, 32))
        self.graphs = 0
        self.product = torch.compile(self._product, backend=self._counted)

    def _product(self, x):
        return torch.relu(x @ self.own)

    def _counted(self, graph, inputs):
        del inputs
        self.graphs += 1
        return graph.forward

    def forward(self, x):
        return self.product(self.linear(x))


def test_what_the_user_compiled_runs_compiled(clock):
    torch._dynamo.reset()
    model, x = CompiledInside(), torch.randn(8, 32)
    auto = tuned(model, lambda auto: auto(x).sum(), clock)
    assert model.graphs == 1
    assert dict(auto.plan.coverage.rest) == {"CompiledInside": gemm(8, 32, 32)}


def test_no_mode_is_left_where_a_forward_raises(clock):
    def broken(x):
        raise RuntimeError("the user's")

    model = nn.Sequential(nn.Linear(32, 32))
    auto = AutoFloat8(model, "bf16", clock=clock)
    model.append(nn.Identity())
    model[1].forward = broken
    with pytest.raises(RuntimeError, match="the user's"):
        auto(torch.randn(8, 32))
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_plan_and_a_cache_keep_it(clock, scripted_clock, silent_clock, tmp_path):
    def run(clock):
        torch.manual_seed(0)
        model, x = nn.Sequential(Block(None)), torch.randn(8, 32)
        step = lambda auto: auto(x).sum()  # noqa: E731
        return tuned(model, step, clock, cache=tmp_path / "cache.json").plan

    plan, again = run(clock), run(silent_clock)
    assert again.coverage == plan.coverage is not None
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").coverage == plan.coverage
