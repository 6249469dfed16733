"""Fabric: AutoFloat8 around the model, before setup; the plan in the checkpoint."""

import torch
from lightning.fabric import Fabric
from torch import nn

from fp8tune import AutoFloat8, Plan, StaticFilter, TuneConfig

every_size = TuneConfig(static_filter=StaticFilter.DIVISIBLE)  # the model is tiny
fabric = Fabric()
bare = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
auto = AutoFloat8(bare.to(fabric.device), recipe="rowwise", config=every_size)
model, optimizer = fabric.setup(auto, torch.optim.AdamW(auto.parameters()))
for _ in range(4):
    fabric.backward(model(torch.randn(32, 64, device=fabric.device)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
state = {"model": model, "optimizer": optimizer, "plan": auto.freeze().to_dict()}
fabric.save("checkpoint", state)

saved = fabric.load("checkpoint")  # later, to resume: the same plan, nothing is timed
plan = Plan.from_dict(saved["plan"])
again = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
resumed = fabric.setup(AutoFloat8(again.to(fabric.device), plan.recipe, plan=plan))
resumed.load_state_dict(saved["model"])
