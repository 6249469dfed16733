"""Lightning: a Callback of Trainer; resuming from a checkpoint keeps its plan."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fp8tune import StaticFilter, TuneConfig
from fp8tune.integrations.lightning import AutoFloat8Callback


class Model(LightningModule):
    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


callback = AutoFloat8Callback(config=TuneConfig(static_filter=StaticFilter.DIVISIBLE))
data = DataLoader(TensorDataset(torch.randn(256, 64)), batch_size=32)
Trainer(callbacks=[callback], max_epochs=1).fit(Model(), data)
