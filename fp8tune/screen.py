"""Stage 1: which Linears are worth timing, and why each of the others is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fp8tune.config import StaticFilter
from fp8tune.linears import named_linears
from fp8tune.records import Candidate, LeftOut, Reason
from fp8tune.sharding import as_computed, fsdp_linears, is_plain_linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8tune.recipes import Recipe

__all__ = ["AUTO_FILTER_FLAG", "screen", "unmatched_names"]

# torchtitan's users ask for the static filter by putting this flag among the names.
AUTO_FILTER_FLAG = "auto_filter_small_kn"


def screen(
    module: nn.Module,
    recipe: Recipe,
    *,
    filter_fqns: Sequence[str] = (),
    static_filter: StaticFilter = StaticFilter.SMALL_KN,
) -> list[Candidate | LeftOut]:
    """Sort the model's Linears into candidates and those left out.

    Args:
        module: the model.
        recipe: what the candidates would be converted to.
        filter_fqns: a Linear whose FQN contains one of these is left out, as in torchao;
            torchtitan's flag "auto_filter_small_kn" among them asks for "small_kn".
        static_filter: see ``TuneConfig``.

    Returns:
        One record per Linear, in model order.
    """
    names = [name for name in filter_fqns if name != AUTO_FILTER_FLAG]
    small_kn = static_filter is StaticFilter.SMALL_KN or AUTO_FILTER_FLAG in filter_fqns
    embeddings = _embedding_weights(module)
    gathered = fsdp_linears(module)

    def reason(fqn: str, linear: nn.Linear) -> Reason | None:
        if any(name in fqn for name in names):
            return Reason.FILTERED_BY_NAME
        structural = _structural_reason(linear, embeddings)
        if structural:
            return structural
        local = as_computed(linear, fsdp=id(linear) in gathered)
        small = recipe.static_filter(local) if small_kn else None
        return recipe.supports(local) or small

    return [_sorted_out(fqn, x, reason(fqn, x)) for fqn, x in named_linears(module)]


def _sorted_out(
    fqn: str, linear: nn.Linear, reason: Reason | None
) -> Candidate | LeftOut:
    return LeftOut(fqn, linear, reason) if reason else Candidate(fqn, linear)


def unmatched_names(module: nn.Module, filter_fqns: Sequence[str]) -> list[str]:
    """The names in ``filter_fqns`` that no Linear's FQN contains."""
    fqns = [fqn for fqn, _ in named_linears(module)]
    names = [name for name in filter_fqns if name != AUTO_FILTER_FLAG]
    return [name for name in names if not any(name in fqn for fqn in fqns)]


def _structural_reason(linear: nn.Linear, embeddings: set[int]) -> Reason | None:
    # Old-style weight_norm and spectral_norm keep the class, but make `weight` a plain
    # attribute that a hook computes; parametrizations change the class.
    if "weight" not in dict(linear.named_parameters(recurse=False)):
        return Reason.PARAMETRIZED
    if is_plain_linear(linear):
        tied = id(linear.weight) in embeddings
        return Reason.TIED_TO_EMBEDDING if tied else None
    is_float8 = any(kind.__name__ == "Float8Linear" for kind in type(linear).__mro__)
    return Reason.ALREADY_FLOAT8 if is_float8 else Reason.NOT_PLAIN_LINEAR


def _embedding_weights(module: nn.Module) -> set[int]:
    def weights() -> Iterator[torch.Tensor]:
        for child in module.modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag):
                yield child.weight

    return {id(weight) for weight in weights()}
