"""torchao's float8 Linear, in place, and with rowwise scales its grouped GEMM of experts."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from torchao.float8 import (
    Float8LinearConfig,
    Float8LinearRecipeName,
    convert_to_float8_training,
    float8_linear,
)
from torchao.float8.config import (
    CastConfig,
    ScalingGranularity,
    ScalingType,
    e4m3_dtype,
)
from torchao.float8.float8_utils import tensor_to_scale

from fp8tune.decision.gemms import CASTS, base_of, part_name
from fp8tune.decision.reasons import Reason
from fp8tune.model.convert import change_class, restore_class
from fp8tune.model.experts import GroupedLinear
from fp8tune.recipes.casts import CastOperand
from fp8tune.recipes.empty import has_no_rows, linear_without_rows
from fp8tune.recipes.groups import PaddedExperts
from fp8tune.recipes.hardware import (
    has_float8_gemms,
    has_grouped_float8_gemms,
    runs_converted,
    runs_experts,
)
from fp8tune.recipes.prototypes import load

__all__ = ["Float8Linear", "RowwiseExperts", "TorchaoRecipe"]

_HOME_OF_GROUPED = "torchao.prototype.moe_training.fp8_grouped_mm"
_GROUPED = "_to_fp8_rowwise_then_scaled_grouped_mm"


class Float8Linear(float8_linear.Float8Linear):
    """torchao's Float8Linear that takes calls without rows, as experts get them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape (*, K) -> (*, N)."""
        if has_no_rows(self, input):
            return linear_without_rows(self, input)
        return super().forward(input)


class RowwiseExperts(PaddedExperts):
    """A grouped GEMM of experts in float8, a scale for each row, by torchao's kernels.

    They raise where they are to pad groups themselves.
    """

    multiple = 16


@cache
def _grouped_mm() -> Any:
    # A prototype of torchao, which takes seconds to import.
    return getattr(load(_HOME_OF_GROUPED, [_GROUPED], "rowwise", _GROUPED), _GROUPED)


def _of_experts() -> dict[str, Any]:
    arguments = {
        "float8_dtype": e4m3_dtype,
        "pad_token_groups_for_grouped_mm": False,
    }
    return {"product": _grouped_mm(), "arguments": arguments}


class TorchaoRecipe:
    """torchao's Float8Linear against high precision.

    Args:
        name: "tensorwise", "rowwise", "rowwise_with_gw_hp", or a name for a config of
            the user's own.
        config: what torchao is told, apart from ``emulate``.
        device: where the model runs; decides whether the GEMMs are emulated.

    Attributes:
        gathers: whether the config has ``enable_fsdp_float8_all_gather``. It is switched
            in place, by ``fp8tune.recipes.gathering``, so the layers are those of the
            config without it.
    """

    reference = "bfloat16"

    def __init__(
        self, name: str, config: Float8LinearConfig, device: torch.device
    ) -> None:
        self.gathers = config.enable_fsdp_float8_all_gather
        config = dataclasses.replace(config, enable_fsdp_float8_all_gather=False)
        self.name = name
        self._device = device
        self._parts: dict[tuple[str, ...], TorchaoRecipe] = {}
        self._use(config)
        if not config.emulate and not self._runs_on(device):
            self._use(dataclasses.replace(config, emulate=True))
        self.emulated = self._config.emulate
        self.settings = repr(self._config)
        # torchtitan and NeMo set it for this recipe; see pytorch issue 150859.
        rowwise = base_of(name) == Float8LinearRecipeName.ROWWISE.value
        self.inductor_settings = {"emulate_precision_casts": True} if rowwise else {}

    def _use(self, config: Float8LinearConfig) -> None:
        plain = vars(_meta_linear())
        self._config = config
        stub = _converted_stub(config)
        self._kind = type(stub)
        self._attributes = {k: v for k, v in vars(stub).items() if k not in plain}

    def _runs_on(self, device: torch.device) -> bool:
        return has_float8_gemms(device) and runs_converted(
            self.name, self.convert, device
        )

    @cached_property
    def for_any_rows(self) -> "TorchaoRecipe":
        """The same for layers whose calls may have no rows.

        torchao's own class, which raises there, is what everything else is converted to,
        so that a compiled graph is that of a conversion by hand.
        """
        twin = copy.copy(self)
        twin._kind = Float8Linear  # noqa: SLF001
        return twin

    @cached_property
    def takes_experts(self) -> bool:
        """Whether it converts grouped GEMMs too: rowwise, where torchao's kernels run."""
        if self.name != Float8LinearRecipeName.ROWWISE.value or self.emulated:
            return False
        return has_grouped_float8_gemms(self._device) and runs_experts(
            self.name, self.convert, self._device
        )

    @property
    def gemms(self) -> tuple[str, ...]:
        """The GEMMs whose operands are cast."""
        return tuple(
            gemm
            for gemm, (operand, _) in CASTS.items()
            if _is_cast(getattr(self._config, operand))
        )

    def only(self, gemms: tuple[str, ...]) -> "TorchaoRecipe":
        """See ``fp8tune.recipes.recipe.ByGemm``."""
        if gemms not in self._parts:
            off = [x for gemm in set(self.gemms) - set(gemms) for x in CASTS[gemm]]
            casts = {x: _disabled(getattr(self._config, x)) for x in off}
            config = dataclasses.replace(self._config, **casts)
            part = TorchaoRecipe(part_name(self.name, gemms), config, self._device)
            part.settings = self.settings
            self._parts[gemms] = part
        return self._parts[gemms]

    @property
    def config(self) -> Float8LinearConfig:
        """What torchao's own functions take."""
        return self._config

    def supports(self, linear: nn.Linear) -> Reason | None:
        """float8 GEMMs take bf16 or fp32 operands whose K and N are multiples of 16."""
        if linear.weight.dtype not in (torch.bfloat16, torch.float32):
            return Reason.UNSUPPORTED_DTYPE
        n, k = linear.weight.shape[-2:]  # of experts, either of them first
        return Reason.NOT_DIVISIBLE_BY_16 if k % 16 or n % 16 else None

    def static_filter(self, linear: nn.Linear) -> Reason | None:
        """Torchao's thresholds for K and N, measured on one H100 (torchao PR 2410).

        They are of Linears; there are none for grouped GEMMs.
        """
        if isinstance(linear, GroupedLinear):
            return None
        keep = _torchao_auto_filter(self.name)
        return None if keep is None or keep(linear, "") else Reason.SMALL_KN

    @property
    def has_static_filter(self) -> bool:
        """Whether torchao has thresholds for this recipe."""
        return _torchao_auto_filter(self.name) is not None

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear torchao's class and attributes, or the grouped GEMM its own."""
        change_class(linear, *self._change_for(linear))

    def revert(self, linear: nn.Linear) -> None:
        """Take the class and the attributes away."""
        restore_class(linear, *self._change_for(linear))

    def _change_for(self, linear: nn.Linear) -> tuple[type[nn.Linear], dict[str, Any]]:
        if isinstance(linear, GroupedLinear):
            return RowwiseExperts, _of_experts()
        return self._kind, self._attributes

    def casts(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        grad_output: torch.Tensor,
        *,
        grad_input: bool,
        grad_weight: bool,
    ) -> Iterator[CastOperand]:
        """See ``fp8tune.recipes.casts``; rows and columns are scaled over what a GEMM sums up."""
        config = self._config
        operands: list[tuple[torch.Tensor, CastConfig | None, int]] = [
            (input, config.cast_config_input, 1),
            (weight, config.cast_config_weight, 1),
        ]
        if grad_input:
            operands.append((grad_output, config.cast_config_grad_output, 1))
            operands.append((weight, config.cast_config_weight_for_grad_input, 0))
        if grad_weight:
            cast = config.cast_config_grad_output_for_grad_weight
            operands.append((grad_output, cast, 0))
            operands.append((input, config.cast_config_input_for_grad_weight, 0))
        for values, cast, dim in operands:
            dtype = cast and cast.target_dtype
            if cast and dtype and _is_cast(cast):
                yield CastOperand(values, self._scale(values, cast, dtype, dim), dtype)

    def _scale(
        self, values: torch.Tensor, cast: CastConfig, dtype: torch.dtype, dim: int
    ) -> torch.Tensor:
        granularity = cast.scaling_granularity
        rowwise = granularity is ScalingGranularity.AXISWISE
        return tensor_to_scale(
            values,
            dtype,
            scaling_granularity=granularity,
            axiswise_dim=dim if rowwise else None,
            round_scales_to_power_of_2=self._config.round_scales_to_power_of_2,
        )


def _is_cast(cast: CastConfig) -> bool:
    return cast.scaling_type is not ScalingType.DISABLED


def _disabled(cast: CastConfig) -> CastConfig:
    # torchao wants one dtype for an operand in both of its GEMMs, also where it is not cast.
    return CastConfig(scaling_type=ScalingType.DISABLED, target_dtype=cast.target_dtype)


def _meta_linear() -> nn.Linear:
    return nn.Linear(16, 16, bias=False, device="meta")


def _converted_stub(config: Float8LinearConfig) -> nn.Linear:
    # Through torchao's public entry point, since only there torchao installs its
    # workaround for a Triton miscompile of transposed float8 stores.
    stub = convert_to_float8_training(_meta_linear(), config=config)
    assert isinstance(stub, nn.Linear)
    return stub


def _torchao_auto_filter(name: str) -> Callable[[nn.Module, str], bool] | None:
    """Torchao's static filter for a recipe, or None where it has no thresholds."""
    try:
        from torchao.float8 import (  # noqa: PLC0415
            _auto_filter_for_recipe,  # pyright: ignore[reportPrivateUsage]
        )

        return _auto_filter_for_recipe(name, filter_fqns=[])
    except (ImportError, NotImplementedError, ValueError):
        return None
