"""A mesh of many ranks in one process, without the others.

torch's "fake" process group answers collectives at once and moves nothing. It is enough
to shard a model that has no weights as rank 0 would hold it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fp8tune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["fake_world", "named_world", "refuse_real_world"]


def named_world(world: Any) -> dict[str, int]:
    """A number of ranks, or sizes by name -> sizes by name; one dimension is "dp".

    Raises:
        ConfigError: anything else.
    """
    sizes = {"dp": world} if isinstance(world, int) else world
    if (
        not isinstance(sizes, dict)
        or not sizes
        or not all(map(_is_size, sizes.items()))
    ):
        raise ConfigError(
            f"world is {world!r}; it must be a number of ranks or the sizes of a mesh by "
            'name, outermost first, for example {"dp": 32, "tp": 8}'
        )
    return sizes


def _is_size(item: tuple[Any, Any]) -> bool:
    name, size = item
    is_int = isinstance(size, int) and not isinstance(size, bool)
    return isinstance(name, str) and is_int and size >= 1


def refuse_real_world() -> None:
    """Refuse to plan for ranks in one of them.

    Raises:
        ConfigError: the process belongs to a process group.
    """
    if dist.is_available() and dist.is_initialized():
        raise ConfigError(
            "this process belongs to a process group, and a plan ahead is made by one "
            "process for all ranks: call it before init_process_group, or in a process "
            "of its own, and give the ranks its cache"
        )


@contextmanager
def fake_world(sizes: Mapping[str, int], device_type: str) -> Generator[DeviceMesh]:
    """Inside the block this process is rank 0 of a world in which it is alone.

    Args:
        sizes: of the mesh by name, outermost first.
        device_type: of the mesh, "cuda" or "cpu".

    Raises:
        ConfigError: the process belongs to a real process group.
    """
    refuse_real_world()
    number = 1
    for size in sizes.values():
        number *= size
    _join_fake_group(number)
    try:
        yield init_device_mesh(
            device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )
    finally:
        dist.destroy_process_group()


def _join_fake_group(size: int) -> None:
    """Torch's own tests and torchtitan use it; there is no public way."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
