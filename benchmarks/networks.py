"""Classifiers that return features and logits: small ones, and those of timm."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.data import FeatureKind
from benchmarks.data.intents import WORDS


class Classifier(nn.Module):
    """A body, features times `scale` (behind BatchNorm1d with a neck), and a linear layer."""

    def __init__(self, body: nn.Module, feature_dim: int, num_classes: int, *, neck: bool) -> None:
        super().__init__()
        self.feature_dim, self.scale = feature_dim, 1.0
        self.body = body
        self.neck: nn.Module = nn.BatchNorm1d(feature_dim) if neck else nn.Identity()
        self.classifier: nn.Module = nn.Linear(feature_dim, num_classes)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.neck(self.body(inputs) * self.scale)
        return features, self.classifier(features)


def digit_classifier(kind: FeatureKind, num_classes: int = 10) -> Classifier:
    """Two convolutions on digits of 8 x 8."""
    body = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    if kind == "signed":
        body += [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64)]
    else:
        pool = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        body += [nn.Conv2d(32, 64, 3, padding=1), *pool]
    return Classifier(nn.Sequential(*body), 64, num_classes, neck=kind == "neck")


def vector_classifier(size: int, dim: int, kind: FeatureKind, num_classes: int) -> Classifier:
    """A hidden layer on vectors of a size."""
    end = nn.Identity() if kind == "signed" else nn.ReLU()
    body = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, dim), end)
    return Classifier(body, dim, num_classes, neck=kind == "neck")


def intent_classifier(kind: FeatureKind, num_classes: int) -> Classifier:
    """A hidden layer on the mean embedding of words and pairs of words."""
    end = nn.Identity() if kind == "signed" else nn.ReLU()
    words = nn.EmbeddingBag(WORDS, 128, mode="mean", padding_idx=0)
    body = nn.Sequential(words, nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 128), end)
    return Classifier(body, 128, num_classes, neck=kind == "neck")


def picture_classifier(num_classes: int) -> Classifier:
    """Four convolutions on pictures of 32 x 32, small for a CPU, with ReLU and pooling."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, 16, 32, 64)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]
    layers += [nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Classifier(nn.Sequential(*layers), 128, num_classes, neck=False)
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model


def backbone_classifier(name: str, weights: Path | str | None, num_classes: int) -> Classifier:
    """The pooled features of a model of timm in front of a new head.

    `weights` is a state dict to start from; None downloads the model's, "none" starts at random.
    """
    complete_torchvision()
    import timm  # noqa: PLC0415 - after the line above

    if not timm.is_model(name):
        raise ValueError(f"--model must be a name of timm, got {name!r}")
    try:
        model: Any = timm.create_model(name, pretrained=weights is None, num_classes=0)
    except Exception as error:
        raise ValueError(
            f"the weights of {name} cannot be downloaded: pass --weights none to start at random, "
            f"or --weights PATH with a state dict ({error})"
        ) from error
    if weights not in (None, "none"):
        try:
            state = torch.load(weights, weights_only=True, map_location="cpu")
            missing = model.load_state_dict(state, strict=False).missing_keys
        except Exception as error:
            raise ValueError(f"--weights {weights} is no state dict of {name}: {error}") from error
        if missing:
            raise ValueError(f"--weights {weights} lacks {len(missing)} of {name}, as {missing[0]}")
    dim = getattr(model, "head_hidden_size", None) or model.num_features
    return Classifier(model, dim, num_classes, neck=False)


def complete_torchvision() -> None:
    """Makes torchvision importable where its compiled operators do not fit this torch.

    Its wheels are built against CUDA and do not load beside a CPU build of torch. The import then
    registers shapes for two operators that must be declared. Only detection models call them.
    """
    try:
        import torchvision  # noqa: F401, PLC0415
    except RuntimeError:  # "operator torchvision::nms does not exist"
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)
