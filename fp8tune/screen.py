"""Stage 1: which Linears are worth timing, and why each of the others is not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from fp8tune.config import StaticFilter
from fp8tune.folding import without_numbers
from fp8tune.linears import named_linears
from fp8tune.records import Candidate, LeftOut, Reason
from fp8tune.sharding import as_computed, fsdp_linears, is_plain_linear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fp8tune.recipes import Recipe

__all__ = ["AUTO_FILTER_FLAG", "screen", "unmatched_names"]

# torchtitan's users ask for the static filter by putting this flag among the names.
AUTO_FILTER_FLAG = "auto_filter_small_kn"

# In a model of so few Linears the first and the last are like any other.
_FEW = 8


def screen(
    module: nn.Module,
    recipes: Sequence[Recipe],
    *,
    filter_fqns: Sequence[str] = (),
    static_filter: StaticFilter = StaticFilter.SMALL_KN,
    include_output_layer: bool = False,
) -> list[Candidate | LeftOut]:
    """Sort the model's Linears into candidates and those left out.

    Args:
        module: the model.
        recipes: what the candidates could be converted to.
        filter_fqns: a Linear whose FQN contains one of these is left out, as in torchao;
            torchtitan's flag "auto_filter_small_kn" among them asks for "small_kn".
        static_filter: see ``TuneConfig``.
        include_output_layer: see ``TuneConfig``.

    Returns:
        One record per Linear, in model order; candidates are left to at least one recipe.
    """
    names = [name for name in filter_fqns if name != AUTO_FILTER_FLAG]
    small_kn = static_filter is StaticFilter.SMALL_KN or AUTO_FILTER_FLAG in filter_fqns
    embeddings = _embedding_weights(module)
    gathered = fsdp_linears(module)
    unstable = {} if include_output_layer else _unstable(module)

    def reason(fqn: str, linear: nn.Linear) -> Reason | None:
        if any(name in fqn for name in names):
            return Reason.FILTERED_BY_NAME
        return _structural_reason(linear, embeddings) or unstable.get(fqn)

    def sorted_out(fqn: str, linear: nn.Linear) -> Candidate | LeftOut:
        why = reason(fqn, linear)
        if why:
            return LeftOut(fqn, linear, why)
        local = as_computed(linear, fsdp=id(linear) in gathered)
        without = _excluded(local, recipes, small_kn=small_kn)
        if len(without) == len(recipes):
            return LeftOut(fqn, linear, without[0][1])
        return Candidate(fqn, linear, without)

    return [sorted_out(fqn, x) for fqn, x in named_linears(module)]


def _excluded(
    local: nn.Linear, recipes: Sequence[Recipe], *, small_kn: bool
) -> tuple[tuple[str, Reason], ...]:
    """(recipe, reason) for the recipes that do not take a Linear of this shape."""
    found = [
        (x.name, x.supports(local) or (x.static_filter(local) if small_kn else None))
        for x in recipes
    ]
    return tuple((name, why) for name, why in found if why)


def _unstable(module: nn.Module) -> dict[str, Reason]:
    """Layers whose float8 others found to hurt training, by name.

    torchtitan's configs leave out ``output``. accelerate leaves out the first and the
    last Linear; in a model of few layers that would be most of it, and a layer of a
    repeated block stays in, since blocks must stay alike for torch.compile.
    """
    linears = list(named_linears(module))
    first, (last, output) = linears[0][0], linears[-1]
    found: dict[str, Reason] = {}
    if len(linears) > _FEW:
        roles = Counter(without_numbers(fqn) for fqn, _ in linears)
        lone = [x for x in (first, last) if roles[without_numbers(x)] == 1]
        found = dict.fromkeys(lone, Reason.FIRST_OR_LAST)
    vocabularies = {x.num_embeddings for x in module.modules() if _is_embedding(x)}
    if output.out_features in vocabularies:
        found[last] = Reason.OUTPUT_LAYER
    return found


def _is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding | nn.EmbeddingBag]:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


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
            if _is_embedding(child):
                yield child.weight

    return {id(weight) for weight in weights()}
