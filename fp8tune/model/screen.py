"""Stage 1: which Linears are worth timing, and why each of the others is not."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fp8tune.config import StaticFilter
from fp8tune.decision.folding import without_numbers
from fp8tune.decision.reasons import Reason
from fp8tune.model.candidates import Candidate, LeftOut
from fp8tune.model.convert import is_converted
from fp8tune.model.experts import GroupedLinear, home_of
from fp8tune.model.linears import named_gemms, named_linears
from fp8tune.model.sharding import (
    as_computed,
    fsdp_modules,
    is_plain_linear,
    kind_of_device,
    running_device,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


__all__ = ["AUTO_FILTER_FLAG", "Takes", "screen", "unmatched_names", "why_not_plain"]

# torchtitan's users ask for the static filter by putting this flag among the names.
AUTO_FILTER_FLAG = "auto_filter_small_kn"


class Takes(Protocol):
    """What screening asks of a recipe; see ``fp8tune.recipes.Recipe``.

    Experts are asked about only where it has ``takes_experts``.
    """

    name: str

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Why this Linear cannot run with the recipe at all, or None if it can."""
        ...

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Why a published table calls this K, N not worth trying, or None."""
        ...


# In a model of so few Linears the first and the last are like any other.
_FEW = 8


def screen(
    module: nn.Module,
    recipes: Sequence[Takes],
    *,
    filter_fqns: Sequence[str] = (),
    static_filter: StaticFilter = StaticFilter.SMALL_KN,
    include_output_layer: bool = False,
) -> list[Candidate | LeftOut]:
    """Sort the model's Linears and grouped GEMMs into candidates and those left out.

    Args:
        module: the model.
        recipes: what the candidates could be converted to.
        filter_fqns: a Linear whose FQN contains one of these is left out, as in torchao;
            torchtitan's flag "auto_filter_small_kn" among them asks for "small_kn".
        static_filter: see ``TuneConfig``.
        include_output_layer: see ``TuneConfig``.

    Returns:
        One record each, in model order; candidates are left to at least one recipe.
    """
    names = [name for name in filter_fqns if name != AUTO_FILTER_FLAG]
    small_kn = static_filter is StaticFilter.SMALL_KN or AUTO_FILTER_FLAG in filter_fqns
    embeddings = _embedding_weights(module)
    gathered = fsdp_modules(module)
    kind = _kind_of_first(module)
    unstable = {} if include_output_layer else _unstable(module)

    def reason(fqn: str, linear: nn.Linear) -> Reason | None:
        if any(name in fqn for name in names):
            return Reason.FILTERED_BY_NAME
        tied = Reason.TIED_TO_EMBEDDING if id(linear.weight) in embeddings else None
        elsewhere = kind_of_device(running_device(linear)) != kind
        other = Reason.OTHER_DEVICE if elsewhere else None
        return why_not_plain(linear) or tied or other or unstable.get(fqn)

    def sorted_out(fqn: str, linear: nn.Linear) -> Candidate | LeftOut:
        why = reason(fqn, linear)
        if why:
            return LeftOut(fqn, linear, why)
        local = as_computed(linear, fsdp=id(home_of(linear)) in gathered)
        without = _excluded(local, recipes, small_kn=small_kn)
        if len(without) == len(recipes):
            return LeftOut(fqn, linear, without[0][1])
        return Candidate(fqn, linear, without)

    return [sorted_out(fqn, x) for fqn, x in named_gemms(module)]


def _kind_of_first(module: nn.Module) -> str:
    """Of the first layer that is not on the meta device, if there is one."""
    devices = (running_device(linear) for _, linear in named_gemms(module))
    return next((kind_of_device(x) for x in devices if x.type != "meta"), "meta")


def _excluded(
    local: nn.Linear, recipes: Sequence[Takes], *, small_kn: bool
) -> tuple[tuple[str, Reason], ...]:
    """(recipe, reason) for the recipes that do not take a layer of this shape."""
    grouped = isinstance(local, GroupedLinear)

    def why_not(recipe: Takes) -> Reason | None:
        if grouped and not getattr(recipe, "takes_experts", False):
            return Reason.NOT_FOR_EXPERTS
        why = recipe.supports(local)
        return why or (recipe.static_filter(local) if small_kn else None)

    found = [(x.name, why_not(x)) for x in recipes]
    return tuple((name, why) for name, why in found if why)


def _unstable(module: nn.Module) -> dict[str, Reason]:
    """Layers whose float8 others found to hurt training, by name.

    torchtitan's configs leave out ``output``. accelerate leaves out the first and the
    last Linear; in a model of few layers that would be most of it, and a layer of a
    repeated block stays in, since blocks must stay alike for torch.compile.
    """
    linears = list(named_linears(module))
    if not linears:
        return {}
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
    """The names in ``filter_fqns`` that no layer's FQN contains."""
    fqns = [fqn for fqn, _ in named_gemms(module)]
    names = [name for name in filter_fqns if name != AUTO_FILTER_FLAG]
    return [name for name in names if not any(name in fqn for fqn in fqns)]


def why_not_plain(linear: nn.Linear) -> Reason | None:
    """Why what runs when this Linear is called is not nn.Linear's GEMM, or None."""
    # Old-style weight_norm and spectral_norm keep the class, but make `weight` a plain
    # attribute that a hook computes; parametrizations change the class.
    home, grouped = home_of(linear), isinstance(linear, GroupedLinear)
    name = linear.parameter if isinstance(linear, GroupedLinear) else "weight"
    if name not in dict(home.named_parameters(recurse=False, remove_duplicate=False)):
        return Reason.PARAMETRIZED
    is_float8 = any(kind.__name__ == "Float8Linear" for kind in type(linear).__mro__)
    if is_float8 or is_converted(linear):
        return Reason.ALREADY_FLOAT8
    if not is_plain_linear(linear):
        return Reason.NOT_PLAIN_LINEAR
    if _has_own_forward(home):
        return Reason.OWN_FORWARD
    return _why_not_plain_weight(linear.weight, dimensions=3 if grouped else 2)


def _has_own_forward(linear: nn.Module) -> bool:
    # It shadows the forward of whatever class the layer is given, unless it says that it
    # looks the class up.
    own = vars(linear).get("forward")
    return own is not None and not getattr(own, "looks_up_class", False)


def _why_not_plain_weight(weight: torch.Tensor, *, dimensions: int) -> Reason | None:
    if type(weight) not in (nn.Parameter, torch.Tensor, DTensor):
        return Reason.WEIGHT_SUBCLASS
    return None if weight.dim() == dimensions else Reason.WEIGHT_NOT_2D


def _embedding_weights(module: nn.Module) -> set[int]:
    def weights() -> Iterator[torch.Tensor]:
        for child in module.modules():
            if _is_embedding(child):
                yield child.weight

    return {id(weight) for weight in weights()}
