"""Models of Transformers by their config.json: built without weights, split as they say."""

from __future__ import annotations

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

# By their names in the tp_plan of a model; for what holds Linears.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


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
        return AutoConfig.from_pretrained(str(path))
    except Exception as error:
        raise ConfigError(
            f"{path} is no config of a model that Transformers knows ({in_short(error)}); "
            "give the config.json of one"
        ) from error


def model_of(config: Any) -> nn.Module:
    """The language model of a config, or else its bare model; in bfloat16 by default."""
    from transformers import (  # noqa: PLC0415
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    kinds = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForMaskedLM)
    fits = [x for x in kinds if type(config) in x._model_mapping]  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    kind: Any = (*fits, AutoModel)[0]
    model: nn.Module = kind.from_config(config, dtype=config.dtype or torch.bfloat16)
    return model.train()


def inputs_of(config: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """What a model of text is called with: ids, and those of the decoder if it has one."""
    ids = torch.empty(shape, dtype=torch.long, device="meta")
    encodes = getattr(config, "is_encoder_decoder", False)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if encodes else {})


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
        if not _holds_linears(model, pattern):
            continue
        if name not in _STYLES:
            raise ModelError(
                f"{kind} splits {pattern} by {name!r}, for which torch has no style; plan "
                "for a function of yours that splits it"
            )
        styles[pattern] = _STYLES[name]()
    return styles


def _holds_linears(model: nn.Module, pattern: str) -> bool:
    """Whether a name with * for a number, or for any one part, is that of a Linear."""
    wanted = pattern.split(".")

    def fits(fqn: str) -> bool:
        parts = fqn.split(".")
        pairs = zip(parts, wanted, strict=False)
        return len(parts) == len(wanted) and all(b in ("*", a) for a, b in pairs)

    return any(fits(fqn) for fqn, _ in named_linears(model))
