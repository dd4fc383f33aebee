"""MobileNetV2 with ImageNet's weights, from a file that a person brings, for 48 x 48 faces."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.samples import FeatureKind
from benchmarks.vision import complete_torchvision

__all__ = ["FEATURE_DIM", "FaceClassifier", "check"]

FEATURE_DIM = 1280
SIZE = 96
FILE = "mobilenet_v2-b0353104.pth"
# Of ImageNet, for pictures in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check(path: Path) -> None:
    """Refuses what is not torchvision's file, whose name ends in the start of its SHA-256.

    Raises:
        ValueError: nothing is there, or something else.
    """
    if not path.is_file():
        raise ValueError(f"--weights must be torchvision's {FILE}, and {path} is no file")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(FILE[-12:-4]):
        raise ValueError(
            f"--weights must be torchvision's {FILE}, whose SHA-256 starts with {FILE[-12:-4]}; "
            f"that of {path} starts with {digest[:8]}"
        )


class FaceClassifier(nn.Module):
    """Pooled features straight into a new head, or through a neck; returns features and logits."""

    def __init__(self, weights: Path | None, kind: FeatureKind, num_classes: int) -> None:
        super().__init__()
        complete_torchvision()
        from torchvision import models  # noqa: PLC0415 - after the line above

        model = models.mobilenet_v2()
        if weights is not None:
            model.load_state_dict(torch.load(weights, weights_only=True))
        self.extractor: nn.Module = model.features
        self.neck = nn.BatchNorm1d(FEATURE_DIM) if kind == "neck" else nn.Identity()
        self.classifier: nn.Module = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of faces (N, 1, 48, 48) as `faces` has them: (grey - 128) / 64."""
        grey = (images * 64 + 128) / 255
        grey = F.interpolate(grey, SIZE, mode="bilinear", align_corners=False)
        mean, deviation = (grey.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        maps = self.extractor((grey - mean) / deviation)
        features = self.neck(maps.mean((2, 3)))
        return features, self.classifier(features)
