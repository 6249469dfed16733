"""Experts on two ranks: one plan, and each rank times the experts and rows that it has."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from fp8tune import AutoFloat8
from fp8tune.decision.records import REFERENCE
from tests.conftest import Ranks, ScriptedClock, WorkingClock

E, K, N, T = 4, 16, 32, 24

pytestmark = pytest.mark.dist


def low(x, weight, *, offs):
    """What BFloat16Experts computes, by hand."""
    return F.grouped_mm(x.bfloat16(), weight.bfloat16(), offs=offs).to(x.dtype)


class Experts(nn.Module):
    """Two grouped GEMMs, of all experts or of those on this rank."""

    def __init__(self, up_by=F.grouped_mm):
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, N, K) / 4)
        self.down = nn.Parameter(torch.randn(E, K, N) / 4)
        self.up_by = up_by

    def forward(self, x, offs):
        up, down = self.up, self.down
        if isinstance(up, DTensor):
            up, down = up.to_local(), down.to_local()
        hidden = F.silu(self.up_by(x, up.transpose(-2, -1), offs=offs))
        return F.grouped_mm(hidden, down.transpose(-2, -1), offs=offs)


class Model(nn.Module):
    """Rows go to the expert that ``chosen`` says, on whatever rank it is."""

    def __init__(self, mesh=None, up_by=F.grouped_mm):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(K, K)
        self.experts = Experts(up_by)
        if mesh is not None:
            self._shard(mesh)
        self.mesh = mesh

    def _shard(self, mesh):
        """Each rank keeps half of the experts, the same for all that own them."""
        for name, x in list(self.experts.named_parameters()):
            local = x.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            part = DTensor.from_local(local, mesh, [Shard(0)])
            setattr(self.experts, name, nn.Parameter(part))

    def forward(self, x, chosen):
        x = self.first(x)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=E)
        if self.mesh is None:
            y = self.experts(x[order], counts.cumsum(0).int())
        else:
            y = self._elsewhere(x[order], counts, self.mesh)
        return y[order.argsort()]

    def _elsewhere(self, x, counts, mesh: DeviceMesh):
        """Send rows to their experts, and what comes of them back."""
        world = mesh.size()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=mesh.get_group())
        sent = counts.view(world, -1).sum(1).tolist()
        come = theirs.view(world, -1).sum(1).tolist()
        rows = all_to_all_single_autograd(x, come, sent, mesh)
        # By the rank that they came from, then by expert; now by expert.
        expert = torch.arange(E // world).repeat(world).repeat_interleave(theirs)
        order = expert.argsort(stable=True)
        offs = theirs.view(world, -1).sum(0).cumsum(0).int()
        y = self.experts(rows[order], offs)[order.argsort()]
        return all_to_all_single_autograd(y, sent, come, mesh)


def only_up(signature, variant):
    """Milliseconds: of all GEMMs only the experts' K -> N gains."""
    gains = signature.shape.experts and signature.shape.n > signature.shape.k
    return 1.0 if variant == REFERENCE else (0.5 if gains else 2.0)


# How likely the rows of each rank go to each expert.
SKEWED = ((1.0, 1.0, 1.0, 1.0), (8.0, 4.0, 1.0, 0.0))
NONE_ON_THE_SECOND = ((1.0, 2.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))


def batch(likely, rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(T, K, generator=generator)
    chances = torch.tensor(likely[rank])
    return x, chances.multinomial(T, replacement=True, generator=generator)


def rows_of(rank, likely, step=0):
    """Rows that come to the experts of a rank in a step."""
    chosen = torch.cat([batch(likely, sender, step)[1] for sender in range(2)])
    return int((chosen // (E // 2) == rank).sum())


def train(called, steps, likely):
    """Outputs, and the gradients of the last step."""
    outputs = []
    for step in range(steps):
        called.zero_grad()
        y = called(*batch(likely, dist.get_rank(), step))
        y.square().mean().backward()
        outputs.append(y.detach())
    grads = [x.grad for x in called.parameters()]
    return outputs, [x.to_local() if isinstance(x, DTensor) else x for x in grads]


def equal(found, expected):
    pairs = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def told(auto, clock, by_hand, likely):
    """The plan, what was timed of experts, and whether training is that by hand."""
    assert auto.frozen
    timed = {x.shape for x, _ in clock.timed if x.shape.experts}
    shapes = sorted((x.experts, x.m, x.k, x.n) for x in timed)
    same = equal(train(auto.module, 3, likely), train(by_hand, 3, likely))
    return str(auto.plan), tuple(auto.plan.converted_fqns), shapes, same


def on_experts_of_their_own(clock_of, likely):
    mesh = init_device_mesh("cpu", (2,))
    clock = clock_of(only_up)
    auto = AutoFloat8(Model(mesh), "bf16", warmup_steps=1, clock=clock)
    train(auto, 2, likely)
    return told(auto, clock, Model(mesh, low), likely)


def shapes(experts, rows):
    """Of both grouped GEMMs: E, T, K and N."""
    return [(experts, rows, K, N), (experts, rows, N, K)]


@pytest.mark.parametrize("clock_of", [ScriptedClock, WorkingClock])
def test_expert_parallelism_has_one_plan_of_what_each_rank_multiplied(
    ranks: Ranks, clock_of
):
    found = ranks(2, on_experts_of_their_own, clock_of, SKEWED, seconds=90)
    (plan, converted, first, same), (other, _, second, as_well) = found[0], found[1]
    assert plan == other
    assert converted == ("experts.up",)
    assert same
    assert as_well
    rows = [rows_of(rank, SKEWED) for rank in range(2)]
    assert sum(rows) == 2 * T
    assert rows[0] > 2 * rows[1] > 0
    assert (first, second) == (shapes(E // 2, rows[0]), shapes(E // 2, rows[1]))


def test_a_rank_whose_experts_get_no_rows_has_the_plan_of_the_other(ranks: Ranks):
    args = (WorkingClock, NONE_ON_THE_SECOND)
    found = ranks(2, on_experts_of_their_own, *args, seconds=90)
    (plan, converted, first, same), (other, _, second, as_well) = found[0], found[1]
    assert plan == other
    assert converted == ("experts.up",)
    assert same
    assert as_well
    assert (first, second) == (shapes(E // 2, 2 * T), [])


def under_fsdp(clock_of):
    mesh = init_device_mesh("cpu", (2,))
    clock = clock_of(only_up)
    module, by_hand = Model(), Model(up_by=low)
    for whole in (module, by_hand):
        fully_shard(whole.experts, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    auto = AutoFloat8(module, "bf16", warmup_steps=1, clock=clock)
    train(auto, 2, SKEWED)
    return told(auto, clock, by_hand, SKEWED)


@pytest.mark.parametrize("clock_of", [ScriptedClock, WorkingClock])
def test_fsdp2_has_one_plan_of_all_experts_and_the_rows_of_a_rank(
    ranks: Ranks, clock_of
):
    found = ranks(2, under_fsdp, clock_of, seconds=90)
    assert found[0] == found[1]
    _, converted, timed, same = found[0]
    assert converted == ("experts.up",)
    assert timed == shapes(E, T)
    assert same
