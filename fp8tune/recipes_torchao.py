"""torchao's float8 Linear, in place."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torchao.float8 import (
    Float8LinearConfig,
    Float8LinearRecipeName,
    convert_to_float8_training,
)
from torchao.float8.config import CastConfig, ScalingGranularity, ScalingType
from torchao.float8.float8_utils import tensor_to_scale

from fp8tune.casts import CastOperand
from fp8tune.convert import change_class, restore_class
from fp8tune.errors import ConfigError
from fp8tune.hardware import has_float8_gemms
from fp8tune.records import Reason

__all__ = ["TorchaoRecipe"]


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
        # torchtitan and NeMo set it for this recipe; see pytorch issue 150859.
        rowwise = name == Float8LinearRecipeName.ROWWISE.value
        self.inductor_settings = {"emulate_precision_casts": True} if rowwise else {}
        plain = vars(_meta_linear())
        self._attributes = {k: v for k, v in vars(self._stub).items() if k not in plain}

    @property
    def config(self) -> Float8LinearConfig:
        """What torchao's own functions take."""
        return self._config

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

    @property
    def has_static_filter(self) -> bool:
        """Whether torchao has thresholds for this recipe."""
        return _torchao_auto_filter(self.name) is not None

    def convert(self, linear: nn.Linear) -> None:
        """Give the Linear torchao's class and attributes."""
        change_class(linear, type(self._stub), self._attributes)

    def revert(self, linear: nn.Linear) -> None:
        """Take torchao's class and attributes away."""
        restore_class(linear, type(self._stub), self._attributes)

    def casts(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        grad_output: torch.Tensor,
        *,
        grad_input: bool,
        grad_weight: bool,
    ) -> Iterator[CastOperand]:
        """See ``fp8tune.casts``; rows and columns are scaled over what a GEMM sums up."""
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
            if cast and dtype and cast.scaling_type is not ScalingType.DISABLED:
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
    return has_float8_gemms(device, rowwise="AXISWISE" in repr(config))


def _torchao_auto_filter(name: str) -> Callable[[nn.Module, str], bool] | None:
    """Torchao's static filter for a recipe, or None where it has no thresholds."""
    try:
        from torchao.float8 import (  # noqa: PLC0415
            _auto_filter_for_recipe,  # pyright: ignore[reportPrivateUsage]
        )

        return _auto_filter_for_recipe(name, filter_fqns=[])
    except (ImportError, NotImplementedError, ValueError):
        return None
