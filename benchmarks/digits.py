"""A small classifier on scikit-learn's handwritten digits, trained with and without the loss."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss

NUM_CLASSES = 10

FeatureKind = Literal["signed", "non-negative"]


class Split(NamedTuple):
    images: Tensor  # (N, 1, 8, 8), in [0, 1]
    labels: Tensor  # (N,)


def load_split(seed: int) -> tuple[Split, Split]:
    """Half of the 1,797 digits to train on and half to test on, classes in equal shares."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test])


class DigitClassifier(nn.Module):
    """Two convolutions and a linear layer; returns features and logits.

    Features are signed (a linear embedding) or non-negative (ReLU and average pooling, as the
    paper's ResNet has them), and then multiplied by `feature_scale`.
    """

    def __init__(
        self, feature_dim: int, kind: FeatureKind = "signed", feature_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.feature_scale = feature_scale
        stem = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if kind == "signed":
            tail = [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, feature_dim)]
        else:
            pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            tail = [nn.Conv2d(32, feature_dim, 3, padding=1), *pool]
        self.extractor = nn.Sequential(*stem, *tail)
        self.classifier = nn.Linear(feature_dim, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extractor(images) * self.feature_scale
        return features, self.classifier(features)


def train(
    model: DigitClassifier,
    data: Split,
    criterion: SeparateLoss | None,
    *,
    separate_weight: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Iterator[int]:
    """Trains with softmax loss plus, where given, the separate loss; yields after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order.split(batch_size):
            features, logits = model(data.images[chosen])
            loss = F.cross_entropy(logits, data.labels[chosen])
            if criterion is not None:
                loss = loss + separate_weight * criterion(features, data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch
