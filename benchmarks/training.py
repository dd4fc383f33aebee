"""Training and measuring a classifier that returns features and logits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from separate_loss import metrics

FeatureKind = Literal["signed", "non-negative", "neck"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features, logits, labels


class Split(NamedTuple):
    images: Tensor  # (N, 1, H, W)
    labels: Tensor  # (N,)


class Figures(NamedTuple):
    """What a trained model gives on images that it has not seen."""

    accuracy: float  # in percent
    intra: float  # mean cosine of features to their class means
    inter: float  # mean cosine between class means
    agreement: float  # mean cosine of learned centers to class means; NaN without any


class Trained(NamedTuple):
    figures: Figures
    features: Tensor  # of the test images, (N, d)
    labels: Tensor  # (N,)
    centers: Tensor | None  # learned, (C, d)
    predicted: Tensor  # (N,)


def joint(criterion: nn.Module | None, weight: float) -> Loss:
    """Softmax loss, plus where given `weight` times a criterion of features and labels."""

    def loss(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        softmax = F.cross_entropy(logits, labels)
        return softmax if criterion is None else softmax + weight * criterion(features, labels)

    return loss


def train(
    model: nn.Module,
    data: Split,
    loss: Loss,
    optimizers: Sequence[Optimizer],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    schedule: LRScheduler | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Iterator[int]:
    """Trains, yielding after each epoch; `schedule` goes on with each step."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order.split(batch_size):
            images, labels = data.images[chosen], data.labels[chosen]
            if augment is not None:
                images = augment(images, generator)
            features, logits = model(images)
            value = loss(features, logits, labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()
            for optimizer in optimizers:
                optimizer.step()
            if schedule is not None:
                schedule.step()
        yield epoch


@torch.no_grad()
def evaluate(model: nn.Module, data: Split, centers: Tensor | None, num_classes: int) -> Trained:
    """Accuracy and the paper's Table 1, all on `data`."""
    model.eval()
    outputs = [model(images) for images in data.images.split(500)]
    features, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    class_means = metrics.class_centers(features, data.labels, num_classes)
    agreement = float("nan")
    if centers is not None:
        centers = centers.detach().clone()
        agreement = metrics.center_agreement(centers, class_means).item()
    predicted = logits.argmax(-1)
    figures = Figures(
        accuracy=100 * (predicted == data.labels).double().mean().item(),
        intra=metrics.intra_class_similarity(features, data.labels, class_means).item(),
        inter=metrics.inter_class_similarity(class_means).item(),
        agreement=agreement,
    )
    return Trained(figures, features, data.labels, centers, predicted)
