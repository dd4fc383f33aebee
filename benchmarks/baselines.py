"""Losses to compare with that no maintained library has, as their repositories commonly write them.

Shapes: N samples, C classes, d features. Each takes features (N, d) and class indices (N,), and
returns a scalar. Centers are parameters, for an optimizer to move.

Y. Wen, K. Zhang, Z. Li, Y. Qiao, "A Discriminative Feature Learning Approach for Deep Face
Recognition", ECCV 2016. J. Cai et al., "Island Loss for Learning Discriminative Features in Facial
Expression Recognition", FG 2018. A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet Loss
for Person Re-Identification", 2017.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BatchHardTripletLoss",
    "CenterLoss",
    "CenterLossByMatrix",
    "IslandLoss",
    "TextbookSeparateLoss",
    "hardest",
]


class _CenterDistance(torch.autograd.Function):
    """Half the squared distance to the own center; the centers' gradient is the paper's rule."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        apart = features - centers.index_select(0, target)
        ctx.save_for_backward(apart, target, centers)
        return apart.square().sum() / (2 * len(features))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        apart, target, centers = ctx.saved_tensors
        count = centers.new_ones(len(centers)).index_add_(0, target, centers.new_ones(len(target)))
        pull = -apart / count.index_select(0, target).unsqueeze(1)
        grad_centers = torch.zeros_like(centers).index_add_(0, target, pull)
        return grad * apart / len(apart), None, grad_centers


def _center_distance(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
    apply: Any = _CenterDistance.apply
    loss: Tensor = apply(features, target, centers)
    return loss


class CenterLoss(nn.Module):
    """Wen et al., ECCV 2016: samples near the centers of their classes.

    Half the mean of ||x_i - c_{y_i}||^2 (the paper has the sum). The gradient that the centers get
    is their Eq. 4, whatever factor stands before the loss: sum_{y_i = j} (c_j - x_i) / (1 + n_j),
    for SGD with the rate alpha (0.5 in the paper).
    """

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return _center_distance(features, target, self.centers)


class CenterLossByMatrix(nn.Module):
    """Center loss by a matrix of all distances (N, C), in its most copied form.

    The mean of ||x_i - c_{y_i}||^2, without the half, under autograd, without 1 + n_j.
    """

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        squares = features.square().sum(1, keepdim=True) + self.centers.square().sum(1)
        distances = torch.addmm(squares, features, self.centers.T, alpha=-2)
        own = target.unsqueeze(1) == torch.arange(len(self.centers), device=target.device)
        return (distances * own).clamp(1e-12, 1e12).sum() / len(features)


class IslandLoss(nn.Module):
    """Cai et al., FG 2018: center loss, and centers in directions apart.

    Center loss plus island_weight times the sum of cos(c_k, c_j) + 1 over all ordered pairs of
    different centers, from the matrix of all of them (C, C).
    """

    def __init__(self, num_classes: int, feature_dim: int, island_weight: float = 10.0) -> None:
        super().__init__()
        self.island_weight = island_weight
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        center = _center_distance(features, target, self.centers)
        return center + self.island_weight * _pairs(F.normalize(self.centers, dim=1))


class TextbookSeparateLoss(nn.Module):
    """Eq. 2 and 3 of the separate loss as they stand, under autograd: a matrix of all pairs."""

    def __init__(self, num_classes: int, feature_dim: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        num_classes = len(self.centers)
        directions = F.normalize(self.centers, dim=1)
        cosines = (F.normalize(features, dim=1) * directions[target]).sum(1)
        intra = 1 - (cosines + 1).mean() / 2
        return intra + _pairs(directions) / (2 * num_classes * (num_classes - 1))


def _pairs(directions: Tensor) -> Tensor:
    """The sum of cosine + 1 over ordered pairs of different rows."""
    cosines = directions @ directions.T + 1
    return cosines.sum() - cosines.diagonal().sum()


class BatchHardTripletLoss(nn.Module):
    """Batch-hard mining (Hermans et al., 2017) before torch's TripletMarginLoss.

    Zero for a batch without any triplet.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.triplet = nn.TripletMarginLoss(margin)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        anchor, positive, negative = hardest(features.detach(), target)
        if len(anchor) == 0:
            return features.sum() * 0
        loss: Tensor = self.triplet(features[anchor], features[positive], features[negative])
        return loss


def hardest(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of each anchor, its farthest other sample of the class, its nearest of any other.

    Samples that lack either are no anchors.
    """
    distances = torch.cdist(features, features)
    same = target.unsqueeze(1) == target
    other = same.clone().fill_diagonal_(False)
    anchor = (other.any(1) & ~same.all(1)).nonzero().squeeze(1)
    positive = distances.masked_fill(~other, -torch.inf).argmax(1)
    negative = distances.masked_fill(same, torch.inf).argmin(1)
    return anchor, positive[anchor], negative[anchor]
