"""Small classifiers of images (3, 8, 8) that return logits only; each has its head in `head`."""

import torch
from torch import Tensor, nn

NUM_CLASSES = 5


class Residual(nn.Module):
    """Convolutions with a shortcut, and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        logits: Tensor = self.head((maps + self.block(maps)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Patches, a class token, and one transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), 1, 8), patches], 1)
        logits: Tensor = self.head(self.layer(tokens)[:, 0])
        return logits
