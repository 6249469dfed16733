"""The demo's model on the processes that torchrun starts; used by train_llama.py.

The processes form a mesh of dp x fsdp x tp. Those that differ in tp share each layer and
take the same batch. All others take batches of their own: those that differ in fsdp also
share what is stored, those that differ in dp hold copies.

The order is that of most training scripts: tensor parallelism, FSDP2, AutoFloat8, DDP.
"""

import argparse
import os
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "add_arguments"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of the mesh."""
    for name, what in (
        ("dp", "copies of the model"),
        ("fsdp", "processes that share what each copy stores"),
        ("tp", "processes that share each layer"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=what)


class Processes:
    """This process among those that torchrun started, or this one alone.

    Args:
        arguments: the sizes of the mesh, and the device.
        kv_heads: how many heads tensor parallelism can part at most.

    Raises:
        ValueError: sizes that do not fit the number of processes or of heads.

    Attributes:
        first: whether this process prints.
        batches: how many processes take a batch of their own.
    """

    def __init__(self, arguments: argparse.Namespace, kv_heads: int) -> None:
        dp, fsdp, tp = arguments.dp, arguments.fsdp, arguments.tp
        wanted, started = dp * fsdp * tp, int(os.environ.get("WORLD_SIZE", "1"))
        if min(dp, fsdp, tp) < 1 or wanted != started:
            raise ValueError(
                f"--dp {dp} --fsdp {fsdp} --tp {tp}: the product must be the number of "
                f"processes, which is {started}; torchrun --nproc-per-node sets it"
            )
        if kv_heads % tp:
            raise ValueError(
                f"--tp {tp} does not divide {kv_heads} key and value heads"
            )
        self.first = os.environ.get("RANK", "0") == "0"
        self.batches = dp * fsdp
        self._device: str = arguments.device
        self._sizes = (dp, fsdp, tp)
        # DDP knows nothing of tensor parallelism; FSDP2 also does copies.
        self._uses_ddp = dp > 1 and fsdp == tp == 1
        self._mesh: DeviceMesh | None = None

    def __enter__(self) -> Self:
        """Connect the processes."""
        if "RANK" in os.environ:
            if self._device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if self._device == "cuda" else "gloo")
            self._mesh = init_device_mesh(
                self._device, self._sizes, mesh_dim_names=("dp", "fsdp", "tp")
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect them; after an error that is torchrun's business."""
        if self._mesh and error is None:
            dist.destroy_process_group()

    def seed_batches(self) -> None:
        """Random batches of its own to each process that is to have them."""
        if self._mesh:
            dp, fsdp, _ = self._mesh.get_coordinate() or (0, 0, 0)
            torch.manual_seed(1 + dp * self._sizes[1] + fsdp)

    def shard(self, model: nn.Module) -> None:
        """Split layers by tensor parallelism, then what is stored by FSDP2."""
        dp, fsdp, tp = self._sizes
        if self._mesh and tp > 1:
            layout: dict[str, ParallelStyle] = {
                "layers.*.attention.w[qkv]": ColwiseParallel(),
                "layers.*.attention.wo": RowwiseParallel(),
                "layers.*.feed_forward.w[13]": ColwiseParallel(),
                "layers.*.feed_forward.w2": RowwiseParallel(),
            }
            parallelize_module(model, self._mesh["tp"], layout)
        if self._mesh and dp * fsdp > 1 and not self._uses_ddp:
            mesh = self._mesh["dp", "fsdp"] if dp > 1 else self._mesh["fsdp"]
            for block in model.get_submodule("layers").children():
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

    def replicate(self, model: nn.Module) -> nn.Module:
        """Average the gradients of copies, where FSDP2 does not do it."""
        return DistributedDataParallel(model) if self._uses_ddp else model
