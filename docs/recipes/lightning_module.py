"""A LightningModule that contains the criterion, with a validation loop and a resumed run.

As a submodule, the criterion follows the module to its device and into evaluation mode, and its
centers are saved in the checkpoints.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from separate_loss import SoftmaxSeparateLoss

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
inputs, labels = (torch.cat(column) for column in zip(*batches(90), strict=True))
seen = DataLoader(TensorDataset(inputs[:-640], labels[:-640]), batch_size=64)
unseen = DataLoader(TensorDataset(inputs[-640:], labels[-640:]), batch_size=64)


class Classifier(LightningModule):
    """A small network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PATTERN_SIZE, 64), nn.ReLU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, NUM_CLASSES)
        self.criterion = SoftmaxSeparateLoss(self.head)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        loss: Tensor = self.criterion(self.head(self.body(inputs)), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        self.log("unseen", self.criterion(self.head(self.body(inputs)), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(checkpoint: Path, epochs: int, *, resume: bool = False) -> tuple[Classifier, Trainer]:
    """Trains a new module up to `epochs`, if told so from the checkpoint on, and saves it there."""
    torch.manual_seed(0)
    module = Classifier()
    trainer = Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, seen, unseen, ckpt_path=checkpoint if resume else None)
    trainer.save_checkpoint(checkpoint)
    return module, trainer


with TemporaryDirectory() as folder:
    unbroken, _ = train(Path(folder, "unbroken.ckpt"), epochs=2)
    broken_off, _ = train(Path(folder, "resumed.ckpt"), epochs=1)
    resumed, trainer = train(Path(folder, "resumed.ckpt"), epochs=2, resume=True)

losses = broken_off.losses + resumed.losses
centers = resumed.criterion.separate.centers
resumed_alike = torch.equal(centers, unbroken.criterion.separate.centers)
before = centers.clone()
unseen_loss = trainer.validate(resumed, unseen, verbose=False)[0]["unseen"]
evaluation_moves = not torch.equal(centers, before)

print(
    f"loss {losses[0]:.3f} to {losses[-1]:.3f}, unseen {unseen_loss:.3f}, "
    f"resumed alike: {resumed_alike}, evaluation moves centers: {evaluation_moves}"
)
