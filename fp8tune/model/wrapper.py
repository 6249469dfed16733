"""An nn.Module around a model that looks like the model from outside.

The wrapper *shares* the model's registries of parameters, buffers and submodules instead
of holding the model as a child. So state_dict, named_parameters, named_modules and all
tooling built on them see the keys of the bare model, with no prefix to strip, and
checkpoints move freely between wrapped and bare. Attributes are read from the model and
set on the model, and its forward's signature is shown.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self, cast

import torch
from torch import nn

from fp8tune.model.copies import refuse_replica

__all__ = ["SameKeys"]

# torch has no public way to share them; the names are those that nn.Module.__init__ sets
# and that every serialised module contains.
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class SameKeys(nn.Module):
    """Delegates to the module that it wraps.

    Args:
        module: the model; ``.module`` is this very object.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Not by attribute assignment, which would register it as a child.
        self.__dict__["module"] = module
        self.__dict__["training"] = module.training
        self._attach()

    def _attach(self) -> None:
        own, module = vars(self), self.module
        # Half built is the copy of a model that holds the wrapper, such as its forward,
        # which accelerate keeps on what it wraps. Then all is asked of the model.
        if "_parameters" not in vars(module):
            return
        for name in _SHARED:
            own[name] = vars(module)[name]
        shown = _signature_of(module)
        if shown is not None:
            own["__signature__"] = shown
            own["forward"] = own["_shown_forward"] = _forward_with(shown, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own, with its hooks."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with its hooks."""
        return self.module.load_state_dict(*args, **kwargs)

    def register_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the module, whose state_dict is shown; and so are the next three."""
        return self.module.register_state_dict_pre_hook(*args, **kwargs)

    def register_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the module."""
        return self.module.register_state_dict_post_hook(*args, **kwargs)

    def register_load_state_dict_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the module."""
        return self.module.register_load_state_dict_pre_hook(*args, **kwargs)

    def register_load_state_dict_post_hook(self, *args: Any, **kwargs: Any) -> Any:
        """On the module."""
        return self.module.register_load_state_dict_post_hook(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Switch both to training mode, or to eval mode."""
        self.module.train(mode)
        self.__dict__["training"] = mode
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply ``fn`` to the module and its children, not to the wrapper."""
        self.module.apply(fn)
        return self

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Self:
        # to(), cuda(), bfloat16() and their like arrive here.
        self.module._apply(fn, recurse)  # noqa: SLF001 - nn.Module's own protocol
        return self

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_replica(self.module)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model (config, generate, ...) stay reachable."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:  # half built, as while unpickling
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the model, but for what the wrapper itself has."""
        if name == "training" and "module" in vars(self):
            self.module.training = value
        if self._has_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        """Delete from the model, but for what the wrapper itself has."""
        if self._has_own(name):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def _has_own(self, name: str) -> bool:
        own = vars(self)
        return "module" not in own or name in own or hasattr(type(self), name)

    def __dir__(self) -> list[str]:
        """The names of both."""
        return sorted({*super().__dir__(), *dir(self.module)})

    def __getitem__(self, index: Any) -> Any:
        """An item of the model."""
        return cast("Any", self.module)[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        """Set an item of the model."""
        cast("Any", self.module)[index] = value

    def __delitem__(self, index: Any) -> None:
        """Delete an item of the model."""
        del cast("Any", self.module)[index]

    def __len__(self) -> int:
        """The number of the model's items."""
        return len(cast("Any", self.module))

    def __iter__(self) -> Iterator[Any]:
        """The model's items."""
        return iter(cast("Any", self.module))

    def __contains__(self, item: Any) -> bool:
        """Whether the model has the item."""
        return item in cast("Any", self.module)

    def __bool__(self) -> bool:
        """Whatever is true of the model, which need not have a length."""
        return bool(self.module)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what the wrapper has and the model has not."""
        state = dict(super().__getstate__())
        shown = state.pop("_shown_forward", None)
        if state.get("forward") is shown:
            state.pop("forward", None)
        made_anew = (*_SHARED, "__signature__")
        return {k: v for k, v in state.items() if k not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo ``__getstate__``, around the copy of the model."""
        changed = state.get("forward")
        self.__dict__.update(state)
        self._attach()
        if changed is not None:
            self.__dict__["forward"] = changed


def _signature_of(module: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):  # as of a forward that is no Python function
        return None


def _forward_with(shown: inspect.Signature, wrapper: SameKeys) -> Any:
    """The wrapper's forward with the signature of the model's, which trainers read."""

    def forward(self: SameKeys, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    me = inspect.Parameter("wrapper_", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [x.replace() for x in shown.parameters.values()]
    forward.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [me, *parameters], return_annotation=shown.return_annotation
    )
    return types.MethodType(forward, wrapper)
