"""Activation checkpoints that begin inside of a forward, so that backward repeats a part.

What surrounds that forward, such as a function mode, is not there when backward calls the
part again. torch has no public place for more than its own context. A checkpoint, but for
the reentrant one, keeps what it calls again beside the hooks that pack tensors.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

__all__ = ["packing_hooks", "repeat_within"]


def packing_hooks() -> Any:
    """The hooks that pack what is saved for backward right now; None if there are none."""
    if torch.compiler.is_compiling():  # which has the part in its graph
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def repeat_within(
    before: Any, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Let the checkpoint that is under way, if there is one, be repeated inside of a context.

    Args:
        before: what ``packing_hooks`` said where the context began; a checkpoint from
            before repeats the context too.
        around: makes the context.
    """
    hooks = packing_hooks()
    if hooks is None or hooks == before:
        return
    frame: Any = inspect.getclosurevars(hooks[0]).nonlocals.get("frame")
    again = getattr(frame, "recompute_fn", None)
    if again is None or getattr(again, "repeats_within", False):
        return

    def repeat(*args: Any) -> None:
        with around():
            again(*args)

    repeat.repeats_within = True  # pyright: ignore[reportFunctionMemberAccess]
    frame.recompute_fn = repeat
