"""A copy of a model whose tensors have shapes and dtypes, but no values and no memory.

The copy runs forward and backward under ``FakeTensorMode`` and takes what the model would
compute with: tensor-parallel weights stay DTensors of this rank's size, and weights that
FSDP2 shards are those that it gathers, in the dtype of its mixed precision. FSDP2 itself
does not run, since its gathers need the other ranks. The model is only read.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fp8tune.model.copies import plain_twin, registries_of
from fp8tune.model.fake_mode import FakeMode
from fp8tune.model.sharding import gathered_shape, own_dims, to_local

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

__all__ = ["Fakes"]

_T = TypeVar("_T")

# What fully_shard leaves on a module besides its hooks.
_OF_FSDP = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")

_OF_MODULES = set(vars(nn.Module()))

_NO_POLICY = MixedPrecisionPolicy()


class Fakes:
    """Makes fake copies that can be computed with one another.

    Args:
        device: where they are, as after ``model.to(device)``; None leaves each tensor on
            its own.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        # Constants that a forward makes of its own need not be fake.
        self.mode = FakeMode(allow_non_fake_inputs=True)

    def tree(self, values: _T) -> _T:
        """Nested containers with a fake in place of each tensor."""
        with _off_the_record():
            return tree_map_only(torch.Tensor, self._tensor, values)

    def module(self, module: nn.Module) -> tuple[nn.Module, Callable[[Any], Any]]:
        """A copy of a model.

        Returns:
            (the copy, a function that takes a part of the model and returns the copy's).
        """
        memo: dict[int, Any] = {}
        with _off_the_record():
            self._copy_weights(module, memo)
        with _off_the_record(), _CopiesFaked(self._tensor):
            try:
                faked, copies = _deepcopy(module, dict(memo))
            except Exception:  # noqa: BLE001 - raised again where nothing helps
                faked, copies = _deepcopy(module, memo | _uncopied(module, memo))
        return faked, lambda part: copies[id(part)]

    def _copy_weights(self, module: nn.Module, memo: dict[int, Any]) -> None:
        policies = _policies(module)
        for child in module.modules():
            own = (*child._parameters.values(), *child._buffers.values())  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            for tensor in own:
                if tensor is not None and id(tensor) not in memo:
                    sharded = id(child) in policies and isinstance(tensor, DTensor)
                    policy = policies[id(child)] if sharded else None
                    memo[id(tensor)] = self._weight(tensor, policy)
                    _keep_mesh(tensor, memo)

    def _weight(
        self, tensor: torch.Tensor, policy: MixedPrecisionPolicy | None
    ) -> torch.Tensor:
        if policy is not None:
            assert isinstance(tensor, DTensor)
            fake = self._gathered(tensor, policy.param_dtype or tensor.dtype)
        else:
            fake = self._tensor(tensor)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake.detach(), tensor.requires_grad)
        return fake

    def _gathered(self, weight: DTensor, dtype: torch.dtype) -> torch.Tensor:
        """What FSDP2 gathers of a shard: a tensor, or a DTensor of tensor parallelism."""
        local = self._empty(gathered_shape(weight), dtype, to_local(weight).device)
        dims = own_dims(weight)
        if not dims:
            return local
        names = weight.device_mesh.mesh_dim_names
        assert names is not None, "FSDP2 with tensor parallelism needs named dimensions"
        mesh = weight.device_mesh[tuple(names[i] for i in dims)]
        return DTensor.from_local(
            local,
            mesh,
            [weight.placements[i] for i in dims],
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return DTensor.from_local(
                self._tensor(to_local(tensor)),
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            ).requires_grad_(tensor.requires_grad)
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            with self.mode:
                return self.mode.from_tensor(tensor)
        # Not by from_tensor, which would keep a weak reference to the tensor: torch's
        # swap_tensors refuses those.
        fake = self._empty(tensor.shape, tensor.dtype, tensor.device)
        return fake.requires_grad_(tensor.requires_grad)

    def _empty(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
        there = self._device or device
        # The mode is on for no longer: under it, what is read of the model became fake.
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=there)


@contextmanager
def _off_the_record() -> Generator[None]:
    """Leaves are made here, wherever the caller is."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


class _CopiesFaked(TorchFunctionMode):
    """A deep copy of a tensor is a fake, also of one that is nobody's Parameter."""

    def __init__(self, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), self._fake(tensor))
        if func is torch.Tensor.clone:  # a Parameter's deep copy, which memo lacks
            return self._fake(args[0])
        return func(*args, **(kwargs or {}))


def _keep_mesh(tensor: torch.Tensor, memo: dict[int, Any]) -> None:
    """A mesh holds process groups, of which there are no copies."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        memo[id(mesh)] = mesh


def _deepcopy(
    module: nn.Module, memo: dict[int, Any]
) -> tuple[nn.Module, dict[int, Any]]:
    shells = list(_shells(module))
    memo |= {id(original): shell for original, shell, _ in shells}
    for _, shell, attributes in shells:
        vars(shell).update(copy.deepcopy(attributes, memo))
    return copy.deepcopy(module, memo), memo


def _uncopied(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """What has no copies: locks, files, process groups, generators. The copy gets the same."""
    found: dict[int, Any] = {}
    known = {**memo, **{id(x): shell for x, shell, _ in _shells(module)}}
    # Parts first, of which others are made.
    for child in reversed(list(module.modules())):
        for value in [v for k, v in vars(child).items() if k not in _OF_MODULES]:
            try:
                copy.deepcopy(value, {**known, **found})
            except Exception:  # noqa: BLE001 - whatever its class raises
                found[id(value)] = value
    return found


class _Passes(nn.Module):
    """In the place of what wraps a module to reduce its gradients."""

    module: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)


def _shells(
    module: nn.Module,
) -> Iterator[tuple[nn.Module, nn.Module, Mapping[str, Any]]]:
    """Modules that cannot be copied as they are, an object for each, and its attributes."""
    for child in module.modules():
        if isinstance(child, DataParallel | DistributedDataParallel):
            shell = _Passes()
            yield child, shell, {"training": child.training, "_modules": child._modules}  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        elif isinstance(child, FSDPModule):
            twin = plain_twin(child)
            shell = object.__new__(type(twin).__bases__[1])
            yield child, shell, _without_fsdp(vars(twin), _policy_of(child))


def _without_fsdp(
    attributes: Mapping[str, Any], policy: MixedPrecisionPolicy
) -> dict[str, Any]:
    kept = {k: v for k, v in attributes.items() if not k.startswith(_OF_FSDP)}
    for name, hooks in registries_of(kept).items():
        kept[name] = type(hooks)((k, v) for k, v in hooks.items() if not _of_fsdp(v))
    if policy.param_dtype and policy.cast_forward_inputs:
        cast = partial(_cast_arguments, policy.param_dtype)
        kept["_forward_pre_hooks"][_OURS] = cast
        kept["_forward_pre_hooks"].move_to_end(_OURS, last=False)
        kept["_forward_pre_hooks_with_kwargs"][_OURS] = True
    if policy.output_dtype:
        kept["_forward_hooks"][_OURS] = partial(_cast_output, policy.output_dtype)
    return kept


# Numbers of hooks are counted up from 0.
_OURS = -1


def _of_fsdp(hook: object) -> bool:
    home = getattr(hook, "__module__", None)
    return isinstance(home, str) and home.startswith("torch.distributed.fsdp.")


def _cast_arguments(
    dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any
) -> Any:
    del module
    return _cast(dtype, args), _cast(dtype, kwargs)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    del module, args
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, values
    )


def _policies(module: nn.Module) -> dict[int, MixedPrecisionPolicy]:
    """The mixed precision of each module whose weights FSDP2 gathers, by its id."""
    found: dict[int, MixedPrecisionPolicy] = {}
    for root in module.modules():  # inner ones come later, and count
        if isinstance(root, FSDPModule):
            found |= dict.fromkeys(map(id, root.modules()), _policy_of(root))
    return found


def _policy_of(module: FSDPModule) -> MixedPrecisionPolicy:
    """What fully_shard was given; torch has no public question for it."""
    state = module._get_fsdp_state()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return getattr(state, "_mp_policy", _NO_POLICY)
