"""Transformers: a callback of Trainer; resuming from a checkpoint keeps its plan."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fp8tune import StaticFilter, TuneConfig
from fp8tune.integrations.transformers import AutoFloat8Callback

every_size = TuneConfig(static_filter=StaticFilter.DIVISIBLE)  # the model is tiny
sizes = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
model = LlamaForCausalLM(sizes)
rows: Any = [{"input_ids": x, "labels": x} for x in torch.randint(64, (64, 16))]
arguments = TrainingArguments("llama", max_steps=8, save_steps=4, report_to="none")
callback = AutoFloat8Callback(recipe="rowwise", config=every_size)
Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
print(callback.plan)
