"""What a trained network is judged by."""

import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.beyond.data import Data
from separate_loss import metrics

BINS = 15


@torch.no_grad()
def figures(model: nn.Module, data: Data, centers: Tensor | None) -> dict[str, float | None]:
    """Rounded figures on the part to report, against class means of the training part.

    `centers` are learned ones, as directions from the origin of the features, if there are any.
    """
    classes = len(data.class_names)
    model.eval()
    seen, _ = outputs(model, data.training.images)
    features, logits = outputs(model, data.test.images)
    labels, predicted = data.test.labels, logits.argmax(-1)
    means = metrics.class_centers(seen, data.training.labels, classes)
    own = metrics.class_centers(features, labels, classes)
    middle = seen.mean(0).to(means)
    found: dict[str, float | None] = {
        "accuracy": 100 * (predicted == labels).double().mean().item(),
        "recall": 100 * balanced_accuracy_score(labels, predicted),
        "ece": 100 * calibration_error(logits, labels),
        "intra": metrics.intra_class_similarity(features, labels, own).item(),
        "inter": metrics.inter_class_similarity(own).item(),
        "closest": closest(own),
    }
    for name, inputs in data.unknown.items():
        strange, _ = outputs(model, inputs)
        found[f"auroc {name}"] = 100 * auroc(features, strange, means)
        found[f"centred auroc {name}"] = 100 * auroc(
            features - middle, strange - middle, means - middle
        )
    found["agreement"] = (
        None if centers is None else metrics.center_agreement(centers.detach(), means).item()
    )
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits."""
    parts = [model(part) for part in inputs.split(500)]
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, logits


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: how far accuracy is from confidence, by bins of confidence."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = confidence - (predicted == labels).double()
    sums = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, gaps)
    return sums.abs().sum().item() / len(labels)


def closest(means: Tensor) -> float:
    """The cosine of the two class means that are nearest to each other."""
    units = F.normalize(means, dim=-1)
    return (units @ units.T).fill_diagonal_(-1).max().item()


def auroc(known: Tensor, strange: Tensor, means: Tensor) -> float:
    """How well the cosine to the nearest class mean tells samples of known classes from others."""
    both = F.normalize(torch.cat([known, strange]).to(means), dim=-1)
    nearest = (both @ F.normalize(means, dim=-1).T).amax(-1)
    is_known = torch.arange(len(both)) < len(known)
    return float(roc_auc_score(is_known, nearest))
