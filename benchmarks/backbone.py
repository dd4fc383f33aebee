"""A backbone with ImageNet's weights and a new head, which returns features and logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.vision import complete_torchvision

__all__ = ["DEVIATION", "MEAN", "Classifier", "prepared"]

# Of ImageNet, for pictures in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """Pooled features straight into a linear head, through an embedding or a neck where asked for.

    Args:
        model: a name of torchvision or of timm, torchvision's first.
        weights: a state dict to start from; None downloads the library's, "none" starts at random.
        num_classes: of the head.
        feature_dim: of a linear embedding in between; None has none.
        neck: whether BatchNorm1d comes before the head.

    """

    def __init__(
        self,
        model: str,
        weights: Path | str | None,
        num_classes: int,
        feature_dim: int | None = None,
        *,
        neck: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, dim = _backbone(model, weights)
        self.between: nn.Module = nn.Identity()
        if feature_dim is not None:
            self.between, dim = nn.Linear(dim, feature_dim), feature_dim
        if neck:
            self.between = nn.Sequential(self.between, nn.BatchNorm1d(dim))
        self.feature_dim = dim
        self.classifier: nn.Module = nn.Linear(dim, num_classes)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.between(self.backbone(pictures))
        return features, self.classifier(features)


def _backbone(name: str, weights: Path | str | None) -> tuple[nn.Module, int]:
    complete_torchvision()
    import timm  # noqa: PLC0415 - after the line above
    from torchvision import models  # noqa: PLC0415

    of_torchvision = name in models.list_models()
    if not of_torchvision and not timm.is_model(name):
        raise ValueError(f"--model must be a name of torchvision or timm, got {name!r}")
    model: Any
    if of_torchvision:
        model = models.get_model(name, weights="DEFAULT" if weights is None else None)
    else:
        model = timm.create_model(name, pretrained=weights is None)
    if weights is not None and weights != "none":
        _load(model, Path(weights))
    if not of_torchvision:
        model.reset_classifier(0)
        return model, getattr(model, "head_hidden_size", None) or model.num_features
    head = "fc" if hasattr(model, "fc") else "classifier"
    linear = [one for one in getattr(model, head).modules() if isinstance(one, nn.Linear)]
    if len(linear) != 1:
        raise ValueError(f"--model {name}: expected one linear layer in its {head}; take timm's")
    setattr(model, head, nn.Identity())
    return model, linear[0].in_features


def _load(model: nn.Module, path: Path) -> None:
    """Weights without the head's, of which there must be all."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        missing = model.load_state_dict(state, strict=False).missing_keys
    except Exception as error:
        raise ValueError(f"--weights {path} is no state dict of this model: {error}") from error
    missing = [name for name in missing if not name.startswith(("fc.", "classifier.", "head."))]
    if missing:
        raise ValueError(f"--weights {path} lacks {len(missing)} of the model, as {missing[0]}")


def prepared(size: int, *, mirror: bool) -> Callable[[Image.Image], Tensor]:
    """Pictures as the network takes them: of one size, normalised, and half of them mirrored."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))

    def transform(picture: Image.Image) -> Tensor:
        pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
        if mirror and torch.rand(()) < 0.5:
            tensor = tensor.flip(-1)
        return (tensor - mean) / deviation

    return transform
