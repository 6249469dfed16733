"""torchao: find the plan in a few steps, then convert a model that has no weights yet."""

import torch
from torch import nn
from torchao.float8 import convert_to_float8_training

from fp8tune import AutoFloat8, StaticFilter, TuneConfig
from fp8tune.integrations import float8_config

every_size = TuneConfig(static_filter=StaticFilter.DIVISIBLE)  # the model is tiny
bare = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
auto = AutoFloat8(bare, recipe="rowwise", config=every_size)
for _ in range(4):
    auto(torch.randn(32, 64)).square().mean().backward()
plan = auto.freeze()
plan.save("plan.json")  # in another program: plan = Plan.load("plan.json")

with torch.device("meta"):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
recipe = float8_config(plan)
convert_to_float8_training(model, config=recipe, module_filter_fn=plan.module_filter_fn)
model.to_empty(device="cpu").load_state_dict(bare.state_dict())
for _ in range(4):
    model(torch.randn(32, 64)).square().mean().backward()
