"""accelerate, run 2: the plan of run 1 as an fp8 recipe, with or without FSDP2."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp8tune import Plan
from fp8tune.integrations.accelerate import ao_recipe_kwargs

plan = Plan.load("plan.json")
recipe = ao_recipe_kwargs(plan)
accelerator = Accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])
bare = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
data = DataLoader(TensorDataset(torch.randn(256, 64)), batch_size=32)
model, optimizer, data = accelerator.prepare(
    bare, torch.optim.AdamW(bare.parameters()), data
)
for (batch,) in data:
    accelerator.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
