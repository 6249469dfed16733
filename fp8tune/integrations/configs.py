"""Models of Transformers by their config.json: built without weights, split as they say."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from fp8tune.errors import ConfigError, ModelError, in_short
from fp8tune.integrations import needs
from fp8tune.model.linears import named_linears

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["inputs_of", "load_config", "model_of", "parallelize"]

_gathers = partial(ColwiseParallel, output_layouts=Replicate())
_splits_input = partial(RowwiseParallel, input_layouts=Replicate())

# By their names in the tp_plan of a model; for what holds Linears. One that is packed, as
# gate and up are, is split within each part, and so has the same local shape.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "packed_colwise": ColwiseParallel,
    "colwise_gather_output": _gathers,
    "colwise_rep": _gathers,
    "rowwise": RowwiseParallel,
    "packed_rowwise": RowwiseParallel,
    "rowwise_split_input": _splits_input,
    "rowwise_rep": _splits_input,
}
# These leave every rank the whole weight.
_WHOLE = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"}


def load_config(path: str | os.PathLike[str]) -> Any:
    """The config of a model.

    Args:
        path: a config.json.

    Raises:
        ConfigError: it is no file, or no config that Transformers knows.
        MissingPackageError: Transformers is not installed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}; give the config.json of a model")
    with needs("transformers"):
        from transformers import AutoConfig  # noqa: PLC0415 - takes seconds
    try:
        config = AutoConfig.from_pretrained(str(path))
    except Exception as error:
        raise ConfigError(
            f"{path} is no config of a model that Transformers knows ({in_short(error)}); "
            "give the config.json of one"
        ) from error
    # Training keeps no keys and values, and not every layer can.
    config.use_cache = False
    return config


def model_of(config: Any) -> nn.Module:
    """The language model of a config, or else its bare model; in bfloat16 by default."""
    kind = _kind_of(config)
    model: nn.Module = kind.from_config(config, dtype=_dtype_of(config))
    return model.train()


def _dtype_of(config: Any) -> torch.dtype:
    return config.dtype or torch.bfloat16


def _kind_of(config: Any) -> Any:
    from transformers import (  # noqa: PLC0415
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)
    return next((x for x in kinds if _maps(x, config)), AutoModel)


def _maps(kind: Any, config: Any) -> Any:
    """What a kind of models makes of a config, or None."""
    return kind._model_mapping.get(type(config), None)  # noqa: SLF001


def inputs_of(config: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a model is called with.

    Args:
        config: the model's.
        shape: of the token ids, and of those of the decoder if there is one too; of a
            model that takes pixels or sound, the shape of these.
    """
    name: str = getattr(_maps(_kind_of(config), config), "main_input_name", "input_ids")
    is_text = name == "input_ids"
    dtype = torch.long if is_text else _dtype_of(config)
    first = torch.empty(shape, dtype=dtype, device="meta")
    encodes = is_text and getattr(config, "is_encoder_decoder", False)
    return {name: first} | ({"decoder_input_ids": first} if encodes else {})


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split a model over the dimension "tp" by its own tensor-parallel plan.

    Embeddings and experts stay whole: what they hold is no Linear, and the Linears around
    them are called the same way.

    Raises:
        ModelError: it has no such plan, or one that splits a Linear in another way.
        ConfigError: the mesh has a dimension that is neither data nor tensor parallel.
    """
    names = mesh.mesh_dim_names or ()
    for name in names:
        if name != "tp" and not name.startswith("dp"):
            raise ConfigError(
                f"the mesh has the dimension {name!r}, and a model of Transformers is "
                "split over tp only; name the others dp"
            )
    if "tp" in names:
        parallelize_module(model, mesh["tp"], _plan_of(model))
    return model


def _plan_of(model: nn.Module) -> dict[str, ParallelStyle]:
    kind = type(model).__name__
    own: dict[str, str] = getattr(model, "tp_plan", None) or {}
    if not own:
        raise ModelError(
            f"{kind} has no tensor-parallel plan of its own; leave tp out of the mesh, or "
            "plan for a function of yours that splits it"
        )
    styles: dict[str, ParallelStyle] = {}
    for pattern, name in own.items():
        for fqn in () if name in _WHOLE else _linears_of(model, pattern):
            if name not in _STYLES:
                raise ModelError(
                    f"{kind} splits {pattern} by {name!r}, for which torch has no style; "
                    "plan for a function of yours that splits it"
                )
            styles[fqn] = _STYLES[name]()
    return styles


def _linears_of(model: nn.Module, pattern: str) -> list[str]:
    """The Linears that a name with * for a number, or for any one part, stands for."""
    wanted = pattern.split(".")

    def fits(fqn: str) -> bool:
        parts = fqn.split(".")
        pairs = zip(parts, wanted, strict=False)
        return len(parts) == len(wanted) and all(b in ("*", a) for a, b in pairs)

    return [fqn for fqn, _ in named_linears(model) if fits(fqn)]
