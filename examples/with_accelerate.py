"""accelerate, run 1: AutoFloat8 around the model, before prepare."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp8tune import AutoFloat8, StaticFilter, TuneConfig

every_size = TuneConfig(static_filter=StaticFilter.DIVISIBLE)  # the model is tiny
accelerator = Accelerator(mixed_precision="bf16")
bare = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
auto = AutoFloat8(bare.to(accelerator.device), recipe="rowwise", config=every_size)
data = DataLoader(TensorDataset(torch.randn(256, 64)), batch_size=32)
model, optimizer, data = accelerator.prepare(
    auto, torch.optim.AdamW(auto.parameters()), data
)
for (batch,) in data:
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
plan = auto.freeze()
if accelerator.is_main_process:
    plan.save("plan.json")
