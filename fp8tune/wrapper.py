"""An nn.Module around a model that looks like the model from outside.

The wrapper *shares* the model's registries of parameters, buffers and submodules instead
of holding the model as a child. So state_dict, named_parameters, named_modules and all
tooling built on them see the keys of the bare model, with no prefix to strip, and
checkpoints move freely between wrapped and bare.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

__all__ = ["SameKeys"]


def _share_registries(wrapper: nn.Module, module: nn.Module) -> None:
    """Make both modules use the same dictionaries.

    torch has no public way to do this; the names are those that nn.Module.__init__ sets
    and that every serialised module contains.
    """
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        wrapper.__dict__[name] = module.__dict__[name]


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
        _share_registries(self, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The module's own, with its hooks."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with its hooks."""
        return self.module.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Switch both to training mode, or to eval mode."""
        self.module.train(mode)
        self.training = mode
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

    def __getattr__(self, name: str) -> Any:
        """Attributes of the model (config, generate, ...) stay reachable."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:  # half built, as while unpickling
                raise
            return getattr(self.module, name)
