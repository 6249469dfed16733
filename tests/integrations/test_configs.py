"""Plans for models of Transformers by their configs, split as these say."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    DeepseekV3Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    T5Config,
    ViTConfig,
)

from fp8tune import ConfigError, Fp8TuneError, ModelError, Plan, TuneConfig, plan_ahead
from fp8tune.decision.reasons import Reason
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
# Its first layer is dense, so what its plan says of experts is not true of every layer.
DEEPSEEK = DeepseekV3Config(
    **SMALL,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
# Its router is a Linear that returns two tensors.
LLAMA4 = Llama4TextConfig(
    **SMALL,
    intermediate_size_mlp=96,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    pad_token_id=0,
)
# None of its layers has keys and values that a cache could hold.
JAMBA = JambaConfig(**SMALL, num_key_value_heads=2, num_experts=2, attn_layer_offset=4)
VIT = ViTConfig(**(SMALL | {"image_size": 32, "patch_size": 16}))
T5 = T5Config(d_model=64, d_ff=96, d_kv=16, num_layers=1, num_heads=4, vocab_size=128)


def planned(
    folder: Path, config: Any, world: Any = 1, shape: tuple[int, ...] = (2, 8)
) -> Plan:
    """For two rows of eight tokens on each rank."""
    path = folder / "config.json"
    config.to_json_file(path)
    loaded = configs.load_config(path)
    return plan_ahead(
        partial(configs.model_of, loaded),
        configs.inputs_of(loaded, shape),
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


def test_a_plan_holds_for_the_layers_that_have_what_it_splits(tmp_path: Path) -> None:
    made = planned(tmp_path, DEEPSEEK, {"tp": 2})
    assert local(made, "model.layers.0.mlp.down_proj") == (16, 48, 64)
    shared = "model.layers.1.mlp.shared_experts.down_proj"
    assert local(made, shared) == (16, 16, 64)
    whole = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    assert local(made, whole) == (16, 64, 48)


def test_what_splits_its_own_input_has_the_local_shape(tmp_path: Path) -> None:
    made = planned(tmp_path, Olmo2Config(**SMALL), {"tp": 2})
    assert local(made, "model.layers.0.self_attn.o_proj") == (16, 32, 64)


def test_a_linear_of_another_kind_may_return_what_it_likes(tmp_path: Path) -> None:
    made = planned(tmp_path, LLAMA4)
    assert local(made, "model.layers.0.self_attn.q_proj") == (16, 64, 64)
    assert made["model.layers.0.feed_forward.router"].reason is Reason.NOT_PLAIN_LINEAR


def test_pixels_have_the_shape_that_is_given(tmp_path: Path) -> None:
    """Four patches and a token for the class, of each of two pictures."""
    made = planned(tmp_path, VIT, shape=(2, 3, 32, 32))
    assert local(made, "layers.1.mlp.fc1") == (10, 64, 96)


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (LLAMA, "model.layers.0.mlp.down_proj", (16, 96, 64)),
        (JAMBA, "model.layers.0.feed_forward.down_proj", (16, 96, 64)),
        (BertConfig(**SMALL), "bert.encoder.layer.0.output.dense", (16, 96, 64)),
        (T5, "decoder.block.0.layer.2.DenseReluDense.wo", (16, 96, 64)),
    ],
    ids=["decoder", "without attention", "encoder", "both"],
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
