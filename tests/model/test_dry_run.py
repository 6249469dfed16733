"""Local shapes of a dry run are those that real ranks are called with."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fp8tune.errors import ConfigError, ModelError
from fp8tune.model.candidates import Candidate
from fp8tune.model.capture import Capture
from fp8tune.model.dry_run import dry_run
from fp8tune.model.linears import named_gemms
from fp8tune.ranks.fake_world import fake_world, named_world
from tests.helpers import hooks_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

    from fp8tune.decision.records import Signature
    from tests.conftest import Ranks

    Calls = dict[str, tuple[tuple[Signature, int], ...]]

CPU = torch.device("cpu")


class Block(nn.Module):
    """A Linear with bias, one without, and whatever recomputes them."""

    def __init__(self, width: int, reentrant: bool | None) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.reentrant = reentrant

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.mix(x)
        return checkpoint(self.mix, x, use_reentrant=self.reentrant)


class Stack(nn.Module):
    """Token ids -> logits."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.blocks = nn.ModuleList(Block(32, reentrant) for _ in range(2))
        self.out = nn.Linear(32, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Experts(nn.Module):
    """Two grouped GEMMs, K -> N -> K, of the part of the weights that is on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 64, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = map(_local, (self.up, self.down))
        offs = torch.full((up.shape[0],), x.shape[0], dtype=torch.int32)
        hidden = torch.relu(functional.grouped_mm(x, up.transpose(-2, -1), offs=offs))
        return functional.grouped_mm(hidden, down.mT, offs=offs)


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


class Mixture(nn.Module):
    """Token ids -> logits, all rows in the first expert."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.experts = Experts()
        self.out = nn.Linear(32, 48)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.experts(self.embed(ids).flatten(0, 1)))


def ids() -> torch.Tensor:
    return torch.zeros(2, 8, dtype=torch.long)


def candidates_of(module: nn.Module) -> list[Candidate]:
    return [Candidate(fqn, linear) for fqn, linear in named_gemms(module)]


def calls_of(capture: Capture, candidates: list[Candidate]) -> Calls:
    return {x.fqn: capture.calls(x.fqn) for x in candidates}


def really(module: nn.Module, inner: nn.Module, **inputs: Any) -> Calls:
    """What hooks see in a real step."""
    candidates = candidates_of(inner)
    capture = Capture(inner, candidates, 0)
    output = module(**inputs)
    output = getattr(output, "logits", output)
    output.sum().backward()
    capture.close()
    return calls_of(capture, candidates)


def dryly(module: nn.Module, **inputs: Any) -> Calls:
    candidates = candidates_of(module)
    return calls_of(dry_run(module, candidates, (), inputs, CPU), candidates)


TP_PLAN = {
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
}


def no_layout(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    del mesh
    return model


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    del mesh
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def fsdp_in_bf16(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
    up = model.blocks[0].up  # pyright: ignore[reportIndexIssue]
    fully_shard(up, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    return fully_shard(model, mesh=mesh["dp"])


def fsdp_all_in_bf16(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    return fully_shard(model, mesh=mesh["dp"], mp_policy=policy)


def tp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh["tp"], TP_PLAN)


def split_experts(
    model: nn.Module, mesh: DeviceMesh, *, up: int, down: int
) -> nn.Module:
    experts: Any = model.experts
    for name, dim in (("up", up), ("down", down)):
        whole = getattr(experts, name)
        part = distribute_tensor(whole, mesh["tp"], [Shard(dim)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(part))
    return model


def tp_and_fsdp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fsdp(tp(model, mesh), mesh)


def checkpointed() -> nn.Module:
    return Stack(reentrant=False)


def checkpointed_reentrantly() -> nn.Module:
    return Stack(reentrant=True)


# What is built, how it is sharded, over which mesh, and the dtype of autocast.
Case = tuple[Any, Any, dict[str, int], torch.dtype | None]

ON_TWO: dict[str, Case] = {
    "DDP": (Stack, ddp, {"dp": 2}, None),
    "FSDP2": (checkpointed, fsdp, {"dp": 2}, None),
    "FSDP2 in bfloat16": (checkpointed_reentrantly, fsdp_in_bf16, {"dp": 2}, None),
    "FSDP2 all in bfloat16": (Stack, fsdp_all_in_bf16, {"dp": 2}, None),
    "TP": (checkpointed, tp, {"tp": 2}, torch.bfloat16),
    "TP of experts": (Mixture, partial(split_experts, up=1, down=2), {"tp": 2}, None),
    "EP": (Mixture, partial(split_experts, up=0, down=0), {"tp": 2}, None),
}
ON_FOUR: dict[str, Case] = {
    "TP": (Stack, tp, {"tp": 4}, None),
    "TP and FSDP2": (
        checkpointed,
        tp_and_fsdp,
        {"dp": 2, "tp": 2},
        torch.bfloat16,
    ),
}


def _both(build: Any, layout: Any, sizes: Any, dtype: Any) -> tuple[Calls, Calls]:
    """On one gloo rank: what a dry run says of a sharded model, and what a step shows."""
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    bare = build()
    model = layout(bare, mesh)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return dryly(model, ids=ids()), really(model, bare, ids=ids())


def _both_of_each(cases: dict[str, Case]) -> dict[str, tuple[Calls, Calls]]:
    return {name: _both(*case) for name, case in cases.items()}


def without_weights(build: Any, layout: Any, sizes: Any, dtype: Any) -> Calls:
    """In one process, of a model on the meta device in a world that is not there."""
    with fake_world(sizes, "cpu") as mesh:
        with torch.device("meta"):
            model = build()
        model = layout(model, mesh) if layout is not ddp else model
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return dryly(model, ids=ids())


@pytest.mark.dist
@pytest.mark.parametrize("cases", [ON_TWO, ON_FOUR], ids=["2 ranks", "4 ranks"])
def test_shapes_are_those_of_real_ranks(ranks: Ranks, cases: dict[str, Case]) -> None:
    answers = ranks(2 if cases is ON_TWO else 4, _both_of_each, cases)
    for answer in answers.values():
        assert isinstance(answer, dict), answer
        for name, case in cases.items():
            in_advance, in_training = answer[name]
            assert all(in_training.values()), name
            assert in_advance == in_training, name
            assert without_weights(*case) == in_training, name


def test_gathered_weights_have_the_dtype_of_fsdps_mixed_precision() -> None:
    calls = without_weights(*ON_TWO["FSDP2 in bfloat16"])
    dtypes = {x: y[0][0].shape for x, y in calls.items()}
    assert dtypes["blocks.1.down"].weight_dtype == "bfloat16"
    assert dtypes["blocks.1.down"].input_dtype == "bfloat16"
    assert dtypes["out"].weight_dtype == dtypes["out"].input_dtype == "float32"


def llama() -> nn.Module:
    import transformers  # noqa: PLC0415 - seconds, which ranks need not wait

    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    import transformers  # noqa: PLC0415

    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)


def mixtral_in_bfloat16() -> nn.Module:
    return mixtral().bfloat16()


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.mark.parametrize("build", [llama, mixtral, mixtral_in_bfloat16])
def test_models_of_transformers(build: Callable[[], nn.Module]) -> None:
    pytest.importorskip("transformers")
    model = build()
    inputs = {"input_ids": ids(), "labels": ids(), "use_cache": False}
    in_advance = dryly(model, **inputs)
    assert in_advance == really(model, model, **inputs)
    assert len(in_advance) == len(list(named_gemms(model)))


def test_torchtitans_llama() -> None:
    titan = pytest.importorskip("torchtitan.models.llama3", exc_type=ImportError)
    from torchtitan.models.common.attention import (  # noqa: PLC0415
        ScaledDotProductAttention,
    )

    config = titan.model_registry("debugmodel").model
    config.layers = config.layers[:2]
    for layer in config.layers:  # FlexAttention has no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_states(buffer_device=CPU)
    tokens = {"tokens": ids()}
    assert dryly(model, **tokens) == really(model, model, **tokens)


def test_the_model_is_only_read() -> None:
    model = checkpointed()
    with torch.no_grad():
        model(ids())
    before = {k: (id(v), v._version) for k, v in model.state_dict().items()}
    seed = torch.get_rng_state()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dryly(model, ids=ids())
        model(ids())  # autocast has kept no fake weight
    after = {k: (id(v), v._version) for k, v in model.state_dict().items()}
    assert [x[1] for x in before.values()] == [x[1] for x in after.values()]
    assert all(x.grad is None for x in model.parameters())
    assert torch.equal(seed, torch.get_rng_state())
    assert not any(hooks_of(model).values())
    model.to(torch.float64)  # which torch refuses where a weak reference is left


class LooksAtValues(nn.Module):
    """Its course depends on what its Linear returns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_a_model_that_looks_at_values_is_refused_with_the_way_out() -> None:
    expected = r"does not run on fake tensors.*DataDependent.*tune in the training run"
    with pytest.raises(ModelError, match=expected):
        dryly(LooksAtValues(), x=torch.zeros(2, 16))


def test_a_model_without_a_backward_is_refused() -> None:
    model = nn.Linear(16, 16).requires_grad_(False)
    with pytest.raises(ModelError, match="no tensor that depends on a trained weight"):
        dryly(model, input=torch.zeros(2, 16))


@pytest.mark.parametrize("world", [0, True, {}, {"dp": 0}, {1: 2}, [2], "2"])
def test_a_world_that_cannot_be_is_refused(world: Any) -> None:
    with pytest.raises(ConfigError, match=r"world is .*it must be a number of ranks"):
        named_world(world)


def test_a_fake_world_within_a_real_one_is_refused() -> None:
    with (
        fake_world({"dp": 2}, "cpu"),
        pytest.raises(ConfigError, match="before init_process_group"),
        fake_world({"dp": 2}, "cpu"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)  # the bound is in CPU seconds
@pytest.mark.parametrize(("layers", "hidden"), [(80, 8192), (126, 16384)])
def test_llama3_on_256_gpus_takes_seconds(layers: int, hidden: int) -> None:
    """70B and 405B.

    Seconds are those that the process computed, imports included. They too grow where
    others use the cores, for which the bound leaves room.
    """
    script = f"from tests.model.test_dry_run import large; large({layers}, {hidden})"
    found = subprocess.run(  # noqa: S603 - runs the function below
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    seconds, gigabytes, *shapes = found.stdout.split()
    assert shapes == ["16384", str(hidden), "128"]
    assert float(gigabytes) < 2
    assert float(seconds) < 60


def large(layers: int, hidden: int) -> None:
    """Print CPU seconds, GiB and the M, K, N of the first wk with TP=8 in a world of 256."""
    import transformers  # noqa: PLC0415

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=28672 if layers == 80 else 53248,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    with fake_world({"dp": 32, "tp": 8}, "cpu") as mesh:
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        plan = {
            f"model.layers.*.{x}_proj": ColwiseParallel()
            for x in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
        } | {
            f"model.layers.*.{x}_proj": RowwiseParallel()
            for x in ("self_attn.o", "mlp.down")
        }
        parallelize_module(model, mesh["tp"], plan)
        tokens = torch.zeros(2, 8192, dtype=torch.long, device="meta")
        calls = dryly(model, input_ids=tokens, use_cache=False)
    shape = calls["model.layers.0.self_attn.k_proj"][0][0].shape
    print(time.process_time(), peak_gib(), shape.m, shape.k, shape.n)  # noqa: T201


def peak_gib() -> float:
    """This process's own peak: `ru_maxrss` starts at what its parent held when it forked."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
