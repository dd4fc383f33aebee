"""MobileNetV2 with ImageNet's weights, from a file that a person brings, for 48 x 48 faces."""

import hashlib
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from benchmarks.backbone import DEVIATION, MEAN, Classifier
from benchmarks.samples import FeatureKind

__all__ = ["FEATURE_DIM", "FaceClassifier", "check"]

FEATURE_DIM = 1280
SIZE = 96
FILE = "mobilenet_v2-b0353104.pth"


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


class FaceClassifier(Classifier):
    """Of faces (N, 1, 48, 48) as `faces` has them, (grey - 128) / 64: features and logits."""

    def __init__(self, weights: Path | None, kind: FeatureKind, num_classes: int) -> None:
        super().__init__("mobilenet_v2", weights or "none", num_classes, neck=kind == "neck")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grey = (images * 64 + 128) / 255
        grey = F.interpolate(grey, SIZE, mode="bilinear", align_corners=False)
        mean, deviation = (grey.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
        return super().forward((grey - mean) / deviation)
