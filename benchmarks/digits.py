"""Scikit-learn's handwritten digits, and a small classifier of them."""

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.samples import FeatureKind, Split

__all__ = ["FEATURE_DIM", "NUM_CLASSES", "DigitClassifier", "load_split"]

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

    def __init__(
        self,
        kind: FeatureKind = "signed",
        feature_scale: float = 1.0,
        num_classes: int = NUM_CLASSES,
    ) -> None:
        super().__init__()
        self.feature_scale = feature_scale
        stem = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if kind == "signed":
            tail = [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, FEATURE_DIM)]
        else:
            pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            tail = [nn.Conv2d(32, FEATURE_DIM, 3, padding=1), *pool]
        self.extractor = nn.Sequential(*stem, *tail)
        self.classifier: nn.Module = nn.Linear(FEATURE_DIM, num_classes)
        self.neck = nn.BatchNorm1d(FEATURE_DIM) if kind == "neck" else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.extractor(images) * self.feature_scale)
        return features, self.classifier(features)
