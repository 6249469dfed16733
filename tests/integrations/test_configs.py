"""Plans for models of Transformers by their configs, split as these say."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers")

from transformers import BertConfig, LlamaConfig, MixtralConfig, T5Config

from fp8tune import ConfigError, Fp8TuneError, ModelError, Plan, TuneConfig, plan_ahead
from fp8tune.integrations import configs
from tests.conftest import ScriptedClock
from tests.helpers import all_faster

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2)
MIXTRAL = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
T5 = T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=1, num_heads=4, vocab_size=128)


def planned(folder: Path, config: Any, world: Any = 1) -> Plan:
    """For two rows of eight tokens on each rank."""
    path = folder / "config.json"
    config.to_json_file(path)
    loaded = configs.load_config(path)
    return plan_ahead(
        partial(configs.model_of, loaded),
        configs.inputs_of(loaded, (2, 8)),
        parallelize=configs.parallelize,
        world=world,
        clock=ScriptedClock(all_faster),
        config=TuneConfig(static_filter="divisible"),
    )


def local(plan: Plan, name: str) -> tuple[int, int, int]:
    (signature, _), *_ = plan[name].signatures
    return signature.shape.m, signature.shape.k, signature.shape.n


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_models_are_split_by_their_own_plan(tmp_path: Path, config: Any) -> None:
    made = planned(tmp_path, config, {"dp": 4, "tp": 2})
    assert local(made, "model.layers.1.self_attn.k_proj") == (16, 64, 16)
    assert local(made, "model.layers.1.self_attn.o_proj") == (16, 32, 64)
    assert made["model.layers.1.self_attn.o_proj"].k == 64


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (LLAMA, "model.layers.0.mlp.down_proj", (16, 96, 64)),
        (BertConfig(**SMALL), "bert.encoder.layer.0.output.dense", (16, 96, 64)),
        (T5, "decoder.block.0.layer.2.DenseReluDense.wo", (16, 96, 64)),
    ],
    ids=["decoder", "encoder", "both"],
)
def test_models_of_text(
    tmp_path: Path, config: Any, name: str, expected: tuple[int, int, int]
) -> None:
    assert local(planned(tmp_path, config), name) == expected


@pytest.mark.parametrize(
    ("config", "world", "error", "expected"),
    [
        (BertConfig(**SMALL), {"tp": 2}, ModelError, r"has no tensor-parallel plan"),
        (LLAMA, {"pp": 2}, ConfigError, r"'pp'.*split over tp only"),
        (LLAMA, {"tp": 3}, ModelError, r"sizes of the mesh divide those of the model"),
    ],
)
def test_what_cannot_be_split_is_said_with_the_way_out(
    tmp_path: Path, config: Any, world: Any, error: type[Fp8TuneError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        planned(tmp_path, config, world)
