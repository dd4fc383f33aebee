"""A small classifier on scikit-learn's handwritten digits, trained with and without the loss."""

from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks import training
from benchmarks.training import FeatureKind, Figures, Split, Trained, joint
from separate_loss import SeparateLoss

__all__ = [
    "FEATURE_DIM",
    "NUM_CLASSES",
    "DigitClassifier",
    "FeatureKind",
    "Figures",
    "Split",
    "Trained",
    "evaluate",
    "load_split",
    "train",
]

NUM_CLASSES = 10
FEATURE_DIM = 64


def load_split(seed: int) -> tuple[Split, Split]:
    """Half of the 1,797 digits to train on and half to test on, classes in equal shares."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    return Split(images[train], labels[train]), Split(images[test], labels[test])


class DigitClassifier(nn.Module):
    """Two convolutions and a linear layer; returns features and logits.

    Features are signed (a linear embedding) or non-negative (ReLU and average pooling, as in the
    paper's ResNet), and then multiplied by `feature_scale`; a neck puts BatchNorm1d behind those.
    """

    def __init__(self, kind: FeatureKind = "signed", feature_scale: float = 1.0) -> None:
        super().__init__()
        self.feature_scale = feature_scale
        stem = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if kind == "signed":
            tail = [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, FEATURE_DIM)]
        else:
            pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            tail = [nn.Conv2d(32, FEATURE_DIM, 3, padding=1), *pool]
        self.extractor = nn.Sequential(*stem, *tail)
        self.classifier = nn.Linear(FEATURE_DIM, NUM_CLASSES)
        self.neck = nn.BatchNorm1d(FEATURE_DIM) if kind == "neck" else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.extractor(images) * self.feature_scale)
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
    return training.train(
        model,
        data,
        joint(criterion, separate_weight),
        [torch.optim.Adam(model.parameters(), lr=1e-3)],
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
    )


def evaluate(model: DigitClassifier, data: Split, criterion: SeparateLoss | None) -> Trained:
    """Accuracy and the paper's Table 1, all on `data`."""
    centers = None if criterion is None else criterion.centers
    return training.evaluate(model, data, centers, NUM_CLASSES)
