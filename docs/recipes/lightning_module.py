"""PyTorch Lightning: the loss as a submodule, and a resumed run.

As a submodule, the loss follows the module to its device and into
evaluation mode, and its centers are saved in the checkpoints.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from separate_loss import SoftmaxSeparateLoss

inputs, labels = batches(1, size=5760)[0]
seen = DataLoader(TensorDataset(inputs[640:], labels[640:]), 64)
unseen = DataLoader(TensorDataset(inputs[:640], labels[:640]), 64)
OFF: Any = {"logger": False, "enable_checkpointing": False}


class Classifier(LightningModule):
    """A small network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Linear(PATTERN_SIZE, 64), nn.ReLU())
        head = nn.Linear(16, NUM_CLASSES)
        self.model = nn.Sequential(body, nn.Linear(64, 16), head)
        self.criterion = SoftmaxSeparateLoss(head)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = self.criterion(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.log("unseen", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


torch.manual_seed(0)
first = Classifier()
with TemporaryDirectory() as folder:
    trainer = Trainer(max_epochs=1, **OFF)
    trainer.fit(first, seen, unseen)
    trainer.save_checkpoint(saved := f"{folder}/first.ckpt")
    resumed, trainer = Classifier(), Trainer(max_epochs=2, **OFF)
    trainer.fit(resumed, seen, unseen, ckpt_path=saved)
(result,) = trainer.validate(resumed, unseen, verbose=False)
losses = first.losses + resumed.losses
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, unseen {result}")
