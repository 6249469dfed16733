"""Sharded layers are screened at the shape that this rank's GEMM sees."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fp8tune.config import StaticFilter
from fp8tune.model.candidates import Candidate
from fp8tune.model.screen import screen
from fp8tune.model.sharding import as_computed, fsdp_modules, to_local
from fp8tune.recipes import get_recipe

WORLD = 4


class Pair(nn.Module):
    """Two Linears, which tensor parallelism splits by columns and by rows."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def tensor_parallel(model, mesh):
    layout = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh, layout)


def tp(model):
    return tensor_parallel(model, init_device_mesh("cpu", (WORLD,)))


def fsdp(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def fsdp_each(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for linear in (model.up, model.down):
        fully_shard(linear, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp(model):
    names = ("replicate", "shard")
    return fully_shard(
        model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    )


def both(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])


SHARDINGS = {x.__name__: x for x in (tp, fsdp, fsdp_each, hsdp, both)}


def shapes_of(sharding, width, hidden):
    """(screened, seen by the GEMM) of each layer on this rank; the candidates."""
    torch.manual_seed(0)
    model = SHARDINGS[sharding](Pair(width, hidden))
    gathered = fsdp_modules(model)
    shapes = {}
    for name in ("up", "down"):
        linear = getattr(model, name)
        stand_in = as_computed(linear, fsdp=id(linear) in gathered)
        # With the meta device, as anything that looks at it must not compute.
        shapes[name] = [tuple(to_local(stand_in.weight).shape), None]

        def note(module, args, name=name):
            del args
            shapes[name][1] = tuple(to_local(module.weight).shape)

        linear.register_forward_pre_hook(note)
    records = screen(
        model,
        [get_recipe("rowwise", "cpu")],
        static_filter=StaticFilter.DIVISIBLE,
        include_output_layer=True,
    )
    model(torch.ones(2, width))
    return shapes, [x.fqn for x in records if isinstance(x, Candidate)]


SIZES = [(64, 128), (48, 80), (32, 48)]


def every_shape():
    """One process group for all cases, since starting one takes longer than they do."""
    return {(x, size): shapes_of(x, *size) for x in SHARDINGS for size in SIZES}


@pytest.mark.dist
def test_a_layer_is_screened_at_the_shape_of_its_gemm(ranks):
    answers = ranks(WORLD, every_shape)
    assert len(answers) == WORLD
    for of_rank in answers.values():
        assert len(of_rank) == len(SHARDINGS) * len(SIZES)
        for shapes, candidates in of_rank.values():
            for name, (screened, seen) in shapes.items():
                assert screened == seen
                assert (name in candidates) == all(x % 16 == 0 for x in seen)


def uneven_shapes(dim):
    """What is screened and held of a weight whose sizes the ranks do not divide."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Pair(7, 5)
    layout = {"up": ColwiseParallel() if dim == 0 else RowwiseParallel()}
    linear = parallelize_module(model, mesh["tp"], layout).up
    held = tuple(to_local(linear.weight).shape)
    fully_shard(linear, mesh=mesh["dp"])
    return held, tuple(as_computed(linear, fsdp=True).weight.shape)


def uneven():
    return [uneven_shapes(dim) for dim in (0, 1)]


@pytest.mark.dist
def test_uneven_shards_are_gathered_to_what_the_rank_held_before(ranks):
    answers = ranks(WORLD, uneven)
    for dim in (0, 1):
        pairs = [of_rank[dim] for of_rank in answers.values()]
        assert len(pairs) == WORLD
        assert all(held == screened for held, screened in pairs)
        assert len({held for held, _ in pairs}) == 2
