"""Training with each loss: what the study and the paper's experiment share.

`METHODS` says which losses are trained, `train_steps` is the training loop, and `evaluate` gives
the figures of a model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.losses import CosFaceLoss, ProxyAnchorLoss, SupConLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from benchmarks.losses import BatchHardTripletLoss, CenterLoss
from separate_loss import SeparateLoss, metrics

PAPER_WEIGHT = 0.9
WEIGHT = 1.0  # the default of the simplex form
# Candidates of a tuned weight, or of a margin.
WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
MARGINS = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65)
STARTS, SMALLER = (0.3, 1.0, 3.0), (0.03, 0.1, 0.3)

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features, logits, labels
# From the training samples of each class (C,), the feature size and the weight.
Build = Callable[[Tensor, int, float], nn.Module]


class Method(NamedTuple):
    """A loss that is trained."""

    title: str
    build: Build
    start: tuple[float, ...] = ()  # weights that tuning begins with
    candidates: tuple[float, ...] = WEIGHTS  # those that may follow
    # Moves centers or proxies that are parameters.
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = partial(SGD, lr=0.5)
    is_head: bool = False  # replaces the linear layer and softmax loss
    balanced: bool = False  # class weights in softmax loss, so that all classes count the same

    def objective(self, criterion: Any, weight: float, counts: Tensor | None = None) -> Objective:
        """The loss of a batch: the head's, or softmax loss and the weighted criterion."""
        weights = class_weights(counts) if self.balanced and counts is not None else None

        def loss(features: Tensor, logits: Tensor, labels: Tensor) -> Any:
            if self.is_head:
                return criterion(features, labels)
            softmax = F.cross_entropy(logits, labels, weights)
            if isinstance(criterion, nn.Identity):
                return softmax
            return softmax + weight * criterion(features, labels)

        return loss


def class_weights(counts: Tensor) -> Tensor:
    """Weights (C,) by which all classes count the same."""
    return counts.sum() / (len(counts) * counts.clamp(min=1))


class CosineHead(nn.Module):
    """The scaled cosines of a margin loss, as logits."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, features: Tensor) -> Any:
        return self.criterion.get_logits(features)


def _of_classes(build: Callable[..., nn.Module], **options: Any) -> Build:
    return lambda counts, dim, _: build(len(counts), dim, **options)


def _cosface(counts: Tensor, dim: int, margin: float) -> Any:
    return CosFaceLoss(len(counts), dim, margin=margin, scale=16)


def _balanced(counts: Tensor, dim: int, _: float) -> nn.Module:
    return SeparateLoss(len(counts), dim, weight=class_weights(counts))


_PROXIES, _NONE = partial(Adam, lr=0.01), lambda *_: nn.Identity()
METHODS = {
    "softmax": Method("softmax loss", _NONE),
    "center": Method("+ center loss", _of_classes(CenterLoss), SMALLER),
    "proxy_anchor": Method(
        "+ ProxyAnchor", _of_classes(ProxyAnchorLoss), SMALLER, optimizer=_PROXIES
    ),
    "supcon": Method("+ SupCon", lambda *_: SupConLoss(), SMALLER),
    "triplet": Method("+ batch-hard triplet", lambda *_: BatchHardTripletLoss(), SMALLER),
    "cosface": Method("CosFace", _cosface, (0.1, 0.2, 0.35), MARGINS, is_head=True),
    "paper": Method("+ separate, paper's form", _of_classes(SeparateLoss, form="paper")),
    "simplex": Method("+ separate, simplex form", _of_classes(SeparateLoss), STARTS),
    "softmax_balanced": Method("softmax loss, class weights", _NONE, balanced=True),
    "simplex_balanced": Method("+ separate, simplex form, class weights", _balanced, balanced=True),
}


def train_steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    optimizers: Sequence[Optimizer],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Iterator[Tensor]:
    """Trains on each batch and yields its loss."""
    model.train()
    for inputs, labels in batches:
        features, logits = model(inputs)
        loss = objective(features, logits, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        yield loss.detach()


def learned_centers(criterion: nn.Module) -> Tensor | None:
    """The centers or proxies (C, d) of a loss that has some."""
    centers = getattr(criterion, "centers", getattr(criterion, "proxies", None))
    return centers.detach() if isinstance(centers, Tensor) else None


# In the order in which the study stores them.
FIGURES = (
    "accuracy",  # %
    "recall",  # mean over classes, %
    "calibration",  # expected calibration error, %
    "intra",  # mean cosine of features to their class means
    "inter",  # mean cosine between class means
    "closest",  # largest cosine between class means
    "norm",  # mean, of the features
    "agreement",  # mean cosine of learned centers to class means
    "agreement_lowest",  # of any class
    "nearest",  # accuracy of the nearest learned center, %
    "train_accuracy",  # %
)


def evaluate(
    features: Tensor, logits: Tensor, labels: Tensor, centers: Tensor | None = None
) -> dict[str, float | None]:
    """All of `FIGURES` but the last, to four digits; None where there is no learned center."""
    means = metrics.class_centers(features, labels, logits.shape[1])
    between = F.cosine_similarity(means[:, None], means, dim=-1).fill_diagonal_(-1)
    correct = logits.argmax(-1) == labels
    recalls = [correct[labels == label].double().mean() for label in labels.unique()]
    found = {
        "accuracy": 100 * correct.double().mean(),
        "recall": 100 * torch.stack(recalls).mean(),
        "calibration": 100 * calibration_error(logits, correct),
        "intra": metrics.intra_class_similarity(features, labels, means),
        "inter": metrics.inter_class_similarity(means),
        "closest": between.nan_to_num(-1).max(),  # NaN: classes without samples
        "norm": features.norm(dim=-1).mean(),
    }
    if centers is not None:
        agreements = metrics.center_agreement(centers, means, reduction="none")
        known = agreements[~agreements.isnan()]
        nearest: Any = metrics.nearest_center(features, centers)
        found["nearest"] = 100 * (nearest == labels).double().mean()
        if len(known):  # else the model has become NaN
            found |= {"agreement": known.mean(), "agreement_lowest": known.min()}
    finite = {name: float(f"{float(one):.4g}") for name, one in found.items() if one.isfinite()}
    return {name: finite.get(name) for name in FIGURES[:-1]}


def calibration_error(logits: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """The expected calibration error: confidence minus accuracy, over bins of confidence."""
    confidence = logits.double().softmax(-1).amax(-1).nan_to_num(0.0)
    index = (confidence * bins).long().clamp(max=bins - 1)
    sums = confidence.new_zeros(bins).index_add_(0, index, confidence - correct.double())
    return sums.abs().sum() / len(logits)
