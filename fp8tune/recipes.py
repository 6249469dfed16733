"""What a Linear can be converted to. The only module that imports torchao.

A recipe is bound to a device: on one without float8 GEMMs the torchao recipes emulate
them, which is exact but slow. One more recipe is one more class with the methods of
``Recipe`` and one call of ``register_recipe``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F
from torchao.float8 import (
    Float8LinearConfig,
    Float8LinearRecipeName,
    convert_to_float8_training,
)

from fp8tune.convert import change_class, restore_class
from fp8tune.errors import ConfigError, UnknownRecipeError
from fp8tune.records import Reason

__all__ = [
    "BFloat16Recipe",
    "Recipe",
    "TorchaoRecipe",
    "get_recipe",
    "recipe_names",
    "register_recipe",
    "resolve_recipe",
]


@runtime_checkable
class Recipe(Protocol):
    """One way to convert a Linear, in place and back.

    Attributes:
        name: what the user calls it.
        reference: name of the dtype that it is compared with, for the report.
        settings: everything that changes its speed or numerics, as text; timings in the
            cache hold for equal settings only.
        emulated: whether the device lacks the GEMMs, so that only numerics are real.
    """

    name: str
    reference: str
    settings: str
    emulated: bool

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Why this Linear cannot run with the recipe at all, or None if it can."""
        ...

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Why a published table calls this K, N not worth trying, or None."""
        ...

    def convert(self, linear: nn.Linear) -> None:
        """Switch a plain nn.Linear to the recipe, in place."""
        ...

    def revert(self, linear: nn.Linear) -> None:
        """Switch it back to a plain nn.Linear, in place."""
        ...


class TorchaoRecipe:
    """torchao's Float8Linear against high precision.

    Args:
        name: "tensorwise", "rowwise", "rowwise_with_gw_hp", or a name for a config of
            the user's own.
        config: what torchao is told, apart from ``emulate``.
        device: where the model runs; decides whether the GEMMs are emulated.

    Raises:
        ConfigError: ``enable_fsdp_float8_all_gather`` is set.
    """

    reference = "bfloat16"

    def __init__(
        self, name: str, config: Float8LinearConfig, device: torch.device
    ) -> None:
        _refuse_float8_all_gather(config)
        self.name = name
        self.emulated = config.emulate or not _has_float8_gemms(config, device)
        self._config = dataclasses.replace(config, emulate=self.emulated)
        self.settings = repr(self._config)
        self._stub = _converted_stub(self._config)
        plain = vars(_meta_linear())
        self._attributes = {k: v for k, v in vars(self._stub).items() if k not in plain}

    def supports(self, linear: nn.Linear) -> Reason | None:
        """float8 GEMMs take bf16 or fp32 operands whose K and N are multiples of 16."""
        if linear.weight.dtype not in (torch.bfloat16, torch.float32):
            return Reason.UNSUPPORTED_DTYPE
        n, k = linear.weight.shape
        return Reason.NOT_DIVISIBLE_BY_16 if k % 16 or n % 16 else None

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Torchao's thresholds for K and N, measured on one H100 (torchao PR 2410)."""
        keep = _torchao_auto_filter(self.name)
        return None if keep is None or keep(linear, "") else Reason.SMALL_KN

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear torchao's class and attributes."""
        change_class(linear, type(self._stub), self._attributes)

    def revert(self, linear: nn.Linear) -> None:
        """Take torchao's class and attributes away."""
        restore_class(linear, type(self._stub), self._attributes)


def _meta_linear() -> nn.Linear:
    return nn.Linear(16, 16, bias=False, device="meta")


def _converted_stub(config: Float8LinearConfig) -> nn.Linear:
    # Through torchao's public entry point, since only there torchao installs its
    # workaround for a Triton miscompile of transposed float8 stores.
    stub = convert_to_float8_training(_meta_linear(), config=config)
    assert isinstance(stub, nn.Linear)
    return stub


def _refuse_float8_all_gather(config: Float8LinearConfig) -> None:
    if config.enable_fsdp_float8_all_gather:
        raise ConfigError(
            "the config has enable_fsdp_float8_all_gather=True, which replaces the "
            "layers' Parameters, so that a layer could not be reverted in place. Tune "
            "without it, then convert before sharding with torchao's "
            "convert_to_float8_training(model, config=..., "
            "module_filter_fn=plan.module_filter_fn)"
        )


def _has_float8_gemms(config: Float8LinearConfig, device: torch.device) -> bool:
    """Whether torch._scaled_mm runs this config natively on the device.

    Tensorwise scales need compute capability 8.9, rowwise ones 9.0 (torchao's own
    assertions in its float8 recipes). ROCm reports gfx94x and newer as 9.4 and up.
    """
    if device.type != "cuda":
        return False
    needs_rowwise = "AXISWISE" in repr(config)
    return torch.cuda.get_device_capability(device) >= (
        (9, 0) if needs_rowwise else (8, 9)
    )


def _torchao_auto_filter(name: str) -> Callable[[nn.Module, str], bool] | None:
    """Torchao's static filter for a recipe, or None where it has no thresholds."""
    try:
        from torchao.float8 import (  # noqa: PLC0415
            _auto_filter_for_recipe,  # pyright: ignore[reportPrivateUsage]
        )

        return _auto_filter_for_recipe(name, filter_fqns=[])
    except (ImportError, NotImplementedError, ValueError):
        return None


class BFloat16Linear(nn.Linear):
    """A Linear with float32 weights, inputs and outputs whose GEMMs run in bfloat16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (*, K) -> (*, N), in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        weight = self.weight.to(torch.bfloat16)
        return F.linear(input.to(torch.bfloat16), weight, bias).to(input.dtype)


class BFloat16Recipe:
    """bfloat16 GEMMs inside a float32 model, against float32.

    It needs no GPU and has a real crossover on CPUs with AMX or AVX512-bf16, where small
    GEMMs lose to the cost of the casts.
    """

    name = "bf16"
    reference = "float32"
    settings = "BFloat16Linear"
    emulated = False

    def supports(self, linear: nn.Linear) -> Reason | None:
        """Only float32 weights have something to gain."""
        fits = linear.weight.dtype is torch.float32
        return None if fits else Reason.UNSUPPORTED_DTYPE

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """No published table."""
        del linear

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear the class BFloat16Linear."""
        change_class(linear, BFloat16Linear, {})

    def revert(self, linear: nn.Linear) -> None:
        """Give it back the class nn.Linear."""
        restore_class(linear, BFloat16Linear, {})


RecipeFactory = Callable[[torch.device], Recipe]

_REGISTRY: dict[str, RecipeFactory] = {}


def register_recipe(name: str, factory: RecipeFactory) -> None:
    """Make a recipe known by name.

    Args:
        name: what users pass as ``recipe``.
        factory: called with the model's device, returns the recipe for it.

    Raises:
        ConfigError: the name is taken.
    """
    if name in _REGISTRY:
        raise ConfigError(f"recipe {name!r} is registered already; choose another name")
    _REGISTRY[name] = factory


def recipe_names() -> list[str]:
    """The names that can be passed as ``recipe``, sorted."""
    return sorted(_REGISTRY)


def get_recipe(name: str, device: torch.device | str) -> Recipe:
    """The registered recipe of that name for the device.

    Raises:
        UnknownRecipeError: nobody registered the name; the message lists the known.
    """
    if name not in _REGISTRY:
        known = ", ".join(recipe_names())
        raise UnknownRecipeError(
            f"unknown recipe {name!r}; choose one of {known}, or pass a torchao "
            "Float8LinearConfig or a Recipe"
        )
    return _REGISTRY[name](torch.device(device))


def resolve_recipe(recipe: Any, device: torch.device | str) -> Recipe:
    """A name, a Float8LinearConfig or a Recipe -> the Recipe for the device.

    Raises:
        UnknownRecipeError: an unknown name.
        ConfigError: anything else, or a config that cannot be toggled in place.
    """
    if isinstance(recipe, str):
        return get_recipe(recipe, device)
    if isinstance(recipe, Float8LinearConfig):
        return TorchaoRecipe("custom", recipe, torch.device(device))
    if isinstance(recipe, Recipe) and not isinstance(recipe, type):
        return recipe
    raise ConfigError(
        f"recipe is {recipe!r}; expected a name ({', '.join(recipe_names())}), a torchao "
        "Float8LinearConfig, or an object with the attributes of fp8tune.Recipe"
    )


def _torchao_factory(name: str) -> RecipeFactory:
    def build(device: torch.device) -> Recipe:
        config = Float8LinearConfig.from_recipe_name(name)
        # Backward contracts grad_weight over M, so without padding a last batch whose M
        # is no multiple of 16 would fail.
        padded = dataclasses.replace(config, pad_inner_dim=True)
        return TorchaoRecipe(name, padded, device)

    return build


def _register_builtin() -> None:
    for member in Float8LinearRecipeName:
        register_recipe(member.value, _torchao_factory(member.value))
    register_recipe("bf16", lambda _: BFloat16Recipe())


_register_builtin()
