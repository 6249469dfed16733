"""trl's trainers, which look at the model's class, copy it, and put peft around it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fp8tune import AutoFloat8
from fp8tune.integrations.transformers import AutoFloat8Callback
from fp8tune.recipes import BFloat16Linear
from tests.helpers import hooks_of, widening

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# trl 1.16 and peft 0.21 ask transformers 5.23 for it by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated"
)

WORDS = ["?", "<s>", "</s>", *"abcdefgh"]
MLP = [f"model.layers.{i}.mlp.{role}_proj" for i in range(2) for role in ("gate", "up")]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(words, unk_token="?"))  # noqa: S106
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        **more,
    }


def sft(
    folder: Path, model: nn.Module, *callbacks: TrainerCallback, **options: Any
) -> SFTTrainer:
    rows = [{"text": " ".join("abcdefgh"[i % 8 :])} for i in range(16)]
    return SFTTrainer(
        model,
        SFTConfig(**arguments(folder), max_length=16),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **options,
    )


def converted(model: nn.Module) -> list[str]:
    return [x for x, y in model.named_modules() if isinstance(y, BFloat16Linear)]


def test_sft_with_the_callback(tmp_path: Path, scripted_clock: type) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    trainer = sft(tmp_path, llama(), callback)
    trainer.train()
    assert callback.plan.converted_fqns == converted(trainer.model) == MLP


def test_sft_of_the_bare_model_beside_the_wrapper(
    tmp_path: Path, scripted_clock: type
) -> None:
    model = llama()
    auto = AutoFloat8(model, "bf16", warmup_steps=2, clock=scripted_clock(widening))
    trainer = sft(tmp_path, model)
    trainer.train()
    assert auto.plan.converted_fqns == converted(model) == MLP


def test_sft_with_lora(tmp_path: Path, scripted_clock: type) -> None:
    clock = scripted_clock(widening)
    callback = AutoFloat8Callback(recipe="bf16", warmup_steps=2, clock=clock)
    lora = LoraConfig(r=8, target_modules=["gate_proj"], task_type="CAUSAL_LM")
    trainer = sft(tmp_path, llama(), callback, peft_config=lora)
    trainer.train()
    plan = callback.plan
    (base,) = [
        x for x in plan.decisions if x.fqn.endswith("0.mlp.gate_proj.base_layer")
    ]
    assert {x.grad_weight for x, _ in base.signatures} == {False}
    (adapter,) = [x for x in plan.decisions if "0.mlp.gate_proj.lora_A" in x.fqn]
    assert {x.grad_weight for x, _ in adapter.signatures} == {True}
    assert plan.converted_fqns == converted(trainer.model)
    assert "Linears were timed with frozen weights" in str(plan)


def test_dpo_whose_reference_model_is_a_copy(
    tmp_path: Path, scripted_clock: type
) -> None:
    model = llama()
    auto = AutoFloat8(model, "bf16", warmup_steps=2, clock=scripted_clock(widening))
    rows = [
        {"prompt": "a b", "chosen": " c d", "rejected": " e f g"[: 2 + i % 4]}
        for i in range(16)
    ]
    reference = copy.deepcopy(model)
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(**arguments(tmp_path), max_length=16),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    assert auto.plan.converted_fqns == converted(model) == MLP
    assert converted(reference) == []
    assert hooks_of(reference) == {}
