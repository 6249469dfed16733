"""What a rank really computes with when parameters are sharded.

Tensor parallelism leaves each rank a part of the weight: a DTensor, whose local tensor is
what the GEMM takes. FSDP2 shards once more, at rest only: before a layer runs the whole
(tensor-parallel part of the) weight is gathered. What is timed is the shape during the
GEMM. Nothing here communicates: only local tensors and placements are looked at.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from fp8tune.model.experts import GroupedLinear, plain_class, stand_in

__all__ = [
    "as_computed",
    "fsdp_modules",
    "gathered_shape",
    "is_plain_linear",
    "kind_of_device",
    "own_dims",
    "rebase",
    "rebase_subclass",
    "running_device",
    "to_local",
]


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, detached; the whole if not sharded."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def running_device(linear: nn.Linear) -> torch.device:
    """Where a layer runs: of a sharded weight, which may be offloaded at rest, the mesh's."""
    weight = linear.weight
    if isinstance(weight, DTensor) and weight.device_mesh.device_type != "cpu":
        module = torch.get_device_module(weight.device_mesh.device_type)
        return torch.device(weight.device_mesh.device_type, module.current_device())
    return weight.device


def kind_of_device(device: torch.device) -> str:
    """Devices of one kind take the same time: CPUs, or GPUs of one name."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).name)


def fsdp_modules(module: nn.Module) -> set[int]:
    """Ids of the modules whose weights FSDP2 gathers before they run."""
    roots = [child for child in module.modules() if isinstance(child, FSDPModule)]
    return {id(x) for root in roots for x in root.modules()}


def as_computed(linear: nn.Linear, *, fsdp: bool) -> nn.Linear:
    """A Linear with the weight shape and dtype that this rank's GEMM will see.

    Args:
        linear: the layer; returned itself if its weight is no DTensor.
        fsdp: whether FSDP2 gathers its weight before it runs.

    Returns:
        A stand-in on the meta device where the weight is sharded.
    """
    weight = linear.weight
    if not isinstance(weight, DTensor):
        return linear
    shape = gathered_shape(weight) if fsdp else to_local(weight).shape
    if isinstance(linear, GroupedLinear):
        whole = torch.empty(shape, device="meta", dtype=weight.dtype)
        return stand_in(nn.Parameter(whole), transposed=linear.transposed)
    n, k = shape
    return nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)


def gathered_shape(weight: DTensor) -> list[int]:
    """This rank's shape once FSDP2 has gathered the weight.

    FSDP2 shards over the outermost mesh dimensions, behind a Replicate for hybrid
    sharding, and tensor parallelism over those inside of it. So the first sharding
    placement is FSDP2's and is undone; the later ones stay.
    """
    shape = list(weight.shape)
    mesh = weight.device_mesh
    coordinates = mesh.get_coordinate() or [0] * mesh.ndim
    for i in own_dims(weight):
        placement = weight.placements[i]
        if isinstance(placement, Shard):
            size = shape[placement.dim]
            chunk = -(-size // mesh.size(i))
            left = size - chunk * coordinates[i]
            shape[placement.dim] = max(0, min(chunk, left))
    return shape


def own_dims(weight: DTensor) -> range:
    """The mesh dimensions over which a weight that FSDP2 shards stays as it is."""
    sharding = [i for i, x in enumerate(weight.placements) if not x.is_replicate()]
    first = sharding[0] if sharding else weight.device_mesh.ndim - 1
    return range(first + 1, weight.device_mesh.ndim)


def is_plain_linear(linear: nn.Linear) -> bool:
    """Whether it is not converted: its type, or what fully_shard made of it, is plain."""
    plain = plain_class(linear)
    return rebase(type(linear), plain, plain) is not None


_REBASED: dict[tuple[type, type], type] = {}


def rebase(kind: type, old: type, new: type) -> type | None:
    """``kind`` with ``new`` in place of ``old``, or None if it is not made of ``old``.

    ``fully_shard(linear)`` gives the module a class with the bases (FSDPModule, its
    class); converting such a module swaps the second.
    """
    if kind is old:
        return new
    if kind.__bases__ != (FSDPModule, old):
        return None
    if old is new:
        return kind
    if (kind, new) not in _REBASED:
        own = {k: v for k, v in vars(kind).items() if k == "__deepcopy__"}
        made = type(f"FSDP{new.__name__}", (FSDPModule, new), own)
        _REBASED[kind, new] = made
        _REBASED[made, old] = kind
    return _REBASED[kind, new]


def rebase_subclass(kind: type, old: type, new: type) -> type | None:
    """A class that was derived from ``old`` while a program ran, derived from ``new``.

    Parametrizations make such classes, one for each module. ``kind`` itself stays.

    Returns:
        A new class, or None if ``kind`` has other bases than ``old``.
    """
    if kind.__bases__ != (old,):
        return None
    made_by_python = ("__dict__", "__weakref__")
    own = {k: v for k, v in vars(kind).items() if k not in made_by_python}
    name = kind.__name__.replace(old.__name__, new.__name__)
    return type(name, (new,), own)
