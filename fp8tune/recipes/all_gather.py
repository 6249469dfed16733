"""FSDP2's all-gather in float8, switched on and off in place.

torchao gathers float8 if a weight was wrapped before ``fully_shard``. The same wrapping is
put on and taken off here afterwards: the shard that the parameter holds and the flat one
that FSDP2 gathers become torchao's subclass, which casts before the gather and makes a
float8 weight of what comes out. What FSDP2 allocated for the other kind of gather is let go
of. The Parameter, its shard's memory and the optimizer's states stay.

These are private places of torch. ``missing_places`` names those that a version of torch
lacks, and where one is missing nothing is switched.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torchao.float8.config import ScalingGranularity, ScalingType
from torchao.float8.fsdp_utils import (
    WeightWithDynamicFloat8CastTensor,
    precompute_float8_dynamic_scale_for_fsdp,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

__all__ = [
    "ShardedWeight",
    "missing_places",
    "precompute_scales",
    "resharded",
    "sharded_weights",
    "unwrapped",
]

_OF_PARAM = (
    "_init_extensions",
    "_module_info",
    "_sharded_param_data",
    "_unsharded_inner_tensors",
    "all_gather_outputs",
    "offload_to_cpu",
    "padded_sharded_param_size",
    "sharded_param",
    "sharded_size",
)
_OF_GROUP = (
    "_to_sharded",
    "_use_post_forward_mesh",
    "fsdp_params",
    "is_unsharded",
    "unshard",
    "wait_for_unshard",
)
_OF_STATE = "_fsdp_param_groups"


class ShardedWeight:
    """The weight of a Linear that FSDP2 shards.

    Args:
        group: FSDP2's group of parameters that are gathered together.
        param: what FSDP2 has for the weight.

    Attributes:
        group: as given.
        linear: the layer.
    """

    def __init__(self, group: Any, param: Any) -> None:
        self.group = group
        self._param = param
        self.linear: nn.Linear = param._module_info.module  # noqa: SLF001

    @property
    def on(self) -> bool:
        """Whether it is gathered in float8."""
        return isinstance(self._local, WeightWithDynamicFloat8CastTensor)

    @property
    def _local(self) -> torch.Tensor:
        return self._param.sharded_param._local_tensor  # noqa: SLF001

    def why_not(self) -> str | None:
        """Why it cannot be gathered in float8, in words, or None if it can."""
        param, info = self._param, self._param._module_info  # noqa: SLF001
        sharded: DTensor = param.sharded_param
        if param.offload_to_cpu:
            return "it is offloaded to the CPU, where the cast would run"
        if info.shared_modules:
            return "several layers share it"
        if self.group._use_post_forward_mesh:  # noqa: SLF001
            return "reshard_after_forward is a number of ranks"
        if sharded.device_mesh.device_type == "cpu" and self._is_among_its_like():
            return "gloo gathers float8 only together with another dtype"
        mine = [x for x in sharded.placements if isinstance(x, Shard)]
        if not mine or mine[0].dim != 0:
            return "it is not sharded by rows"
        return _why_uneven(sharded)

    def _is_among_its_like(self) -> bool:
        """Whether nothing but weights of Linears is gathered together with it."""
        infos = [x._module_info for x in self.group.fsdp_params]  # noqa: SLF001
        return all(
            isinstance(x.module, nn.Linear) and x.param_name == "weight" for x in infos
        )

    def turn_on(self, scale: torch.Tensor | None = None) -> None:
        """Gather in float8 from the next gather on; the layer is a Float8Linear.

        As ``turn_off`` to be called inside of ``resharded``.

        Args:
            scale: that of the values as they are, if it is known.
        """
        linear: Any = self.linear
        mm_config, cast = linear.linear_mm_config, linear.config.cast_config_weight
        flat, dtype = self._param._sharded_param_data, cast.target_dtype  # noqa: SLF001
        wrap = WeightWithDynamicFloat8CastTensor
        self._hold(
            wrap(self._local, mm_config, dtype, scale), wrap(flat, mm_config, dtype)
        )

    def turn_off(self) -> None:
        """Gather in high precision from the next gather on."""
        flat = self._param._sharded_param_data  # noqa: SLF001
        self._hold(_inner(self._local), _inner(flat))

    def _hold(self, local: torch.Tensor, flat: torch.Tensor) -> None:
        param = self._param
        param.sharded_param._local_tensor = local  # noqa: SLF001
        param._sharded_param_data = flat  # noqa: SLF001
        param.all_gather_outputs = []
        param._unsharded_inner_tensors = []  # noqa: SLF001
        vars(param).pop("_unsharded_param", None)
        param._init_extensions()  # noqa: SLF001

    @property
    def scale(self) -> torch.Tensor | None:
        """What its values are multiplied by before the cast, or None: found when gathered."""
        return getattr(self._local, "_precomputed_scale", None)

    @scale.setter
    def scale(self, scale: torch.Tensor | None) -> None:
        if self.on:
            local: Any = self._local
            local._precomputed_scale = scale  # noqa: SLF001


def _why_uneven(sharded: DTensor) -> str | None:
    """FSDP2 pads the last shards; torchao casts them without that."""
    rows = sharded.shape[0]
    pairs = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
    parts = math.prod(size for size, placement in pairs if placement.is_shard(0))
    if rows % parts == 0:
        return None
    return (
        f"its {rows} rows make uneven shards on {parts} ranks, which torchao casts to "
        f"unlike sizes; make out_features a multiple of {parts}"
    )


@contextmanager
def resharded(weights: Iterable[ShardedWeight]) -> Generator[None]:
    """Inside the block none of these is gathered; what was is gathered again at its end.

    Collective where something was, as inside of a forward.
    """
    groups: dict[int, Any] = {id(x.group): x.group for x in weights}
    gathered: list[Any] = []
    for group in groups.values():
        group.wait_for_unshard()
        if group.is_unsharded:
            gathered.append(group)
        group._to_sharded()  # noqa: SLF001
    yield
    for group in gathered:
        group.unshard()
        group.wait_for_unshard()


def sharded_weights(module: nn.Module) -> dict[int, ShardedWeight]:
    """The weights of Linears that FSDP2 shards in a model, by the id of the layer."""
    return {
        id(x.linear): x
        for group in _groups(module)
        for x in (ShardedWeight(group, param) for param in group.fsdp_params)
        if isinstance(x.linear, nn.Linear) and _is_weight(x)  # pyright: ignore[reportUnnecessaryIsInstance]
    }


def _is_weight(weight: ShardedWeight) -> bool:
    return weight._param._module_info.param_name == "weight"  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def _groups(module: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for child in module.modules():
        if isinstance(child, FSDPModule):
            state: Any = child._get_fsdp_state()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            for group in getattr(state, _OF_STATE):
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def missing_places(module: nn.Module) -> list[str]:
    """What of torch is needed and not there in this version, of a model under FSDP2."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            get: Any = getattr(child, "_get_fsdp_state", None)
            if get is None:
                return ["_get_fsdp_state"]
            groups = getattr(get(), _OF_STATE, None)
            if groups is None:
                return [_OF_STATE]
            for group in groups:
                missing = [x for x in _OF_GROUP if not hasattr(group, x)]
                for param in getattr(group, "fsdp_params", ()):
                    missing += [x for x in _OF_PARAM if not hasattr(param, x)]
                if missing:
                    return missing
    return []


def takes(config: object) -> bool:
    """Whether layers of a torchao config compute with a weight that came in float8."""
    casts = [
        getattr(config, name, None)
        for name in ("cast_config_weight", "cast_config_weight_for_grad_input")
    ]
    return all(
        x is not None
        and x.scaling_granularity is ScalingGranularity.TENSORWISE
        and x.scaling_type is ScalingType.DYNAMIC
        for x in casts
    )


def precompute_scales(linears: Iterable[nn.Linear]) -> None:
    """Find the scales of weights that are gathered in float8, in one all-reduce a mesh.

    To be called on every rank after the weights changed, as after each optimizer step;
    otherwise each gather makes one of its own.

    Args:
        linears: the layers; those that are not gathered in float8 are left out.
    """
    by_mesh: dict[Any, list[nn.Module]] = {}
    for linear in linears:
        if isinstance(linear.weight, DTensor):
            by_mesh.setdefault(linear.weight.device_mesh, []).append(linear)
    # torchao stacks them, which takes tensors of one mesh.
    for alike in by_mesh.values():
        precompute_float8_dynamic_scale_for_fsdp(nn.ModuleList(alike))


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    wrapped: Any = tensor
    is_wrapped = isinstance(tensor, WeightWithDynamicFloat8CastTensor)
    return wrapped._tensor if is_wrapped else tensor  # noqa: SLF001


def unwrapped(value: Any) -> Any:
    """A tensor of a state_dict that any model takes; anything else as it is."""
    if not isinstance(value, DTensor):
        return _inner(value) if isinstance(value, torch.Tensor) else value
    local = value._local_tensor  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    if not isinstance(local, WeightWithDynamicFloat8CastTensor):
        return value
    return DTensor.from_local(
        _inner(local),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
