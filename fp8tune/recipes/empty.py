"""Calls without rows, such as that of an expert which no token chose.

There is no largest value to scale by, so torchao's casts raise. The plain Linear takes
such a call, and its gradients are zeros.
"""

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn import functional as F

from fp8tune.recipes.recipe import Recipe

__all__ = ["for_any_rows", "has_no_rows", "linear_without_rows"]


def for_any_rows(recipe: Recipe) -> Recipe:
    """What converts a layer whose calls may have no rows."""
    return getattr(recipe, "for_any_rows", recipe)


def has_no_rows(linear: nn.Linear, input: torch.Tensor) -> bool:
    """Whether the input is empty; False where a compiler cannot know."""
    # The weight first: Dynamo numbers a graph's inputs in the order in which they are
    # looked at, and the graph is to be that of torchao's own class.
    number = linear.weight.numel() * input.numel()
    # A size that only shows at run time must not become a question of the compiler's.
    return guard_or_false(number == 0)


def linear_without_rows(linear: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Shape (*, K) -> (*, N), one of * being 0, in the dtype of the input or autocast."""
    bias = None if linear.bias is None else linear.bias.to(input.dtype)
    return F.linear(input, linear.weight.to(input.dtype), bias)
