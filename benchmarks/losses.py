"""The losses that are timed and compared: baselines, and a table of all of them.

No maintained library has these baselines; they are written as their repositories commonly do. Each
takes features (N, d) and class indices (N,), and returns a scalar. Centers are parameters.

Y. Wen, K. Zhang, Z. Li, Y. Qiao, "A Discriminative Feature Learning Approach for Deep Face
Recognition", ECCV 2016. J. Cai et al., "Island Loss for Learning Discriminative Features in Facial
Expression Recognition", FG 2018. A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet Loss
for Person Re-Identification", 2017.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, SoftmaxSeparateLoss

Form = Literal["simplex", "paper"]


class _CenterDistance(torch.autograd.Function):
    """Half the squared distance to the target's center; Wen et al.'s Eq. 4 as centers' gradient."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        difference = features - centers.index_select(0, target)
        ctx.save_for_backward(difference, target, centers)
        return difference.square().sum() / (2 * len(features))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        difference, target, centers = ctx.saved_tensors
        count = centers.new_ones(len(centers)).index_add_(0, target, centers.new_ones(len(target)))
        pull = -difference / count.index_select(0, target).unsqueeze(1)
        grad_centers = torch.zeros_like(centers).index_add_(0, target, pull)
        return grad * difference / len(difference), None, grad_centers


class _Centers(nn.Module):
    """A loss with one center for each class."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))


class CenterLoss(_Centers):
    """Wen et al., ECCV 2016: half the mean of ||x_i - c_{y_i}||^2 (the paper has the sum).

    The gradient of the centers is their Eq. 4, whatever factor stands before the loss:
    sum_{y_i = j} (c_j - x_i) / (1 + n_j), for SGD with the rate alpha (0.5 in the paper).
    """

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        apply: Any = _CenterDistance.apply
        loss: Tensor = apply(features, target, self.centers)
        return loss


class CenterLossByGather(_Centers):
    """Half the mean of ||x_i - c_{y_i}||^2 under autograd, without 1 + n_j."""

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        difference = features - self.centers.index_select(0, target)
        return difference.square().sum() / (2 * len(features))


class CenterLossByMatrix(_Centers):
    """Center loss by a matrix of all distances (N, C), in its most copied form.

    The mean of ||x_i - c_{y_i}||^2, without the half, under autograd, without 1 + n_j.
    """

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        squares = features.square().sum(1, keepdim=True) + self.centers.square().sum(1)
        distances = torch.addmm(squares, features, self.centers.T, alpha=-2)
        own = target.unsqueeze(1) == torch.arange(len(self.centers), device=target.device)
        return (distances * own).clamp(1e-12, 1e12).sum() / len(features)


class IslandLoss(CenterLoss):
    """Cai et al., FG 2018: center loss, plus the sum of cos(c_k, c_j) + 1 over ordered pairs."""

    def __init__(self, num_classes: int, feature_dim: int, island_weight: float = 10.0) -> None:
        super().__init__(num_classes, feature_dim)
        self.island_weight = island_weight

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        pairs = _sum_over_pairs(F.normalize(self.centers, dim=1))
        return super().forward(features, target) + self.island_weight * pairs


class TextbookSeparateLoss(_Centers):
    """Eq. 2 and 3 of the separate loss as written, under autograd: a matrix of all pairs (C, C)."""

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        num_classes = len(self.centers)
        unit_centers = F.normalize(self.centers, dim=1)
        cosines = (F.normalize(features, dim=1) * unit_centers[target]).sum(1)
        intra = 1 - (cosines + 1).mean() / 2
        return intra + _sum_over_pairs(unit_centers) / (2 * num_classes * (num_classes - 1))


def _sum_over_pairs(unit_centers: Tensor) -> Tensor:
    """The sum of cosine + 1 over ordered pairs of different centers."""
    cosines = unit_centers @ unit_centers.T + 1
    return cosines.sum() - cosines.diagonal().sum()


class BatchHardTripletLoss(nn.Module):
    """Hermans et al., 2017: torch's TripletMarginLoss of the hardest triplet of each anchor.

    Zero for a batch without any triplet.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.triplet = nn.TripletMarginLoss(margin)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            distances = torch.cdist(features, features)
        same = target.unsqueeze(1) == target
        positives = same.clone().fill_diagonal_(False)
        anchor = (positives.any(1) & ~same.all(1)).nonzero().squeeze(1)
        if len(anchor) == 0:
            return features.sum() * 0
        positive = distances.masked_fill(~positives, -torch.inf).argmax(1)[anchor]
        negative = distances.masked_fill(same, torch.inf).argmin(1)[anchor]
        loss: Tensor = self.triplet(features[anchor], features[positive], features[negative])
        return loss


def _separate(
    form: Form, center_update: Literal["forward", "gradient"], num_classes: int, feature_dim: int
) -> nn.Module:
    criterion = SeparateLoss(num_classes, feature_dim, form=form, center_update=center_update)
    with torch.no_grad():
        criterion.centers.normal_()  # as in the middle of a training
    return criterion


class _Head(nn.Module):
    """A linear layer and a loss of its logits; without a form, cross-entropy alone."""

    def __init__(self, form: Form | None, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(feature_dim, num_classes)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if form is not None:
            self.criterion = SoftmaxSeparateLoss(self.head, form=form)
            with torch.no_grad():
                self.criterion.separate.centers.normal_()

    def forward(self, features: Tensor, target: Tensor) -> Any:
        return self.criterion(self.head(features), target)


# pytorch-metric-learning is imported only when measured: it takes seconds.
def _pml(name: str, num_classes: int, feature_dim: int) -> nn.Module:
    from pytorch_metric_learning import losses  # noqa: PLC0415

    loss: nn.Module = getattr(losses, name)(num_classes, feature_dim)
    return loss


class Loss(NamedTuple):
    """A loss whose step is timed."""

    build: Callable[[int, int], nn.Module]  # from the number of classes and the feature size
    # Whether a step of SGD moves its parameters. Heads and proxies only get their gradient.
    sgd: bool = False
    compiled: bool = False
    pairs: bool = False  # allocates matrices of all pairs of classes


def _ours(form: Form) -> dict[str, Loss]:
    forward, gradient = (partial(_separate, form, update) for update in ("forward", "gradient"))
    joint = partial(_Head, form)
    return {
        f"SeparateLoss, {form}": Loss(forward),
        f"SeparateLoss, {form}, compiled": Loss(forward, compiled=True),
        f"SeparateLoss, {form}, gradient": Loss(gradient, sgd=True),
        f"SeparateLoss, {form}, gradient, compiled": Loss(gradient, sgd=True, compiled=True),
        # Ends with the gradient of the centers, as the floor does.
        f"SeparateLoss, {form}, gradient, no step": Loss(gradient),
        f"SoftmaxSeparateLoss, {form}": Loss(joint),
        f"SoftmaxSeparateLoss, {form}, compiled": Loss(joint, compiled=True),
    }


LOSSES = {
    **_ours("simplex"),
    **_ours("paper"),
    "textbook": Loss(TextbookSeparateLoss, sgd=True, pairs=True),
    "textbook, compiled": Loss(TextbookSeparateLoss, sgd=True, compiled=True, pairs=True),
    "center loss": Loss(CenterLoss, sgd=True),
    "center loss by gather": Loss(CenterLossByGather, sgd=True),
    "center loss by matrix": Loss(CenterLossByMatrix, sgd=True),
    "island loss": Loss(IslandLoss, sgd=True, pairs=True),
    "triplet, batch-hard": Loss(lambda *_: BatchHardTripletLoss()),
    "PML ProxyAnchor": Loss(partial(_pml, "ProxyAnchorLoss")),
    "PML CosFace": Loss(partial(_pml, "CosFaceLoss")),
    "PML ArcFace": Loss(partial(_pml, "ArcFaceLoss")),
    "cross-entropy head": Loss(partial(_Head, None)),
}
