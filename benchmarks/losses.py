"""The losses that are timed and compared: baselines, and a table of all of them.

No maintained library has these baselines; they are written as their repositories commonly do. Each
takes features (N, d) and class indices (N,), and returns a scalar. Centers are parameters.

Y. Wen, K. Zhang, Z. Li, Y. Qiao, "A Discriminative Feature Learning Approach for Deep Face
Recognition", ECCV 2016. A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet Loss for Person
Re-Identification", 2017.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, SoftmaxSeparateLoss


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


class SeparateLossOverPairs(_Centers):
    """Eq. 2 and 3 of the separate loss as written, under autograd: a matrix of all pairs (C, C)."""

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        num_classes = len(self.centers)
        unit_centers = F.normalize(self.centers, dim=1)
        cosines = (F.normalize(features, dim=1) * unit_centers[target]).sum(1)
        intra = 1 - (cosines + 1).mean() / 2
        pairs = unit_centers @ unit_centers.T + 1
        inter = (pairs.sum() - pairs.diagonal().sum()) / (2 * num_classes * (num_classes - 1))
        return intra + inter


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


class _Head(nn.Module):
    """A linear layer and a loss of its logits."""

    def __init__(
        self, criterion: Callable[[nn.Linear], nn.Module], num_classes: int, feature_dim: int
    ) -> None:
        super().__init__()
        self.head = nn.Linear(feature_dim, num_classes)
        self.criterion = criterion(self.head)

    def forward(self, features: Tensor, target: Tensor) -> Any:
        return self.criterion(self.head(features), target)


def _pml(name: str, num_classes: int, feature_dim: int) -> nn.Module:
    from pytorch_metric_learning import losses  # noqa: PLC0415 - takes seconds

    loss: nn.Module = getattr(losses, name)(num_classes, feature_dim)
    return loss


class Loss(NamedTuple):
    """A loss whose step is timed."""

    build: Callable[[int, int], nn.Module]  # from the number of classes and the feature size
    # Whether a step of SGD moves its parameters. Heads and proxies only get their gradient.
    sgd: bool = False
    compiled: bool = False


FORMS: dict[str, Literal["simplex", "paper"]] = {"simplex form": "simplex", "paper's form": "paper"}
PAIRS = "separate loss, sum over pairs"
LOSSES: dict[str, Loss] = {}
for title, form in FORMS.items():
    # No center is zero, as in the middle of a training.
    ours = partial[nn.Module](SeparateLoss, form=form, center_init="sphere")
    joint = partial(_Head, partial(SoftmaxSeparateLoss, form=form, center_init="sphere"))
    gradient = partial(ours, center_update="gradient")
    LOSSES |= {
        f"SeparateLoss, {title}": Loss(ours),
        f"SeparateLoss, {title}, compiled": Loss(ours, compiled=True),
        f"SeparateLoss, {title}, gradient": Loss(gradient, sgd=True),
        f"SoftmaxSeparateLoss, {title}": Loss(joint),
        f"SoftmaxSeparateLoss, {title}, compiled": Loss(joint, compiled=True),
    }
LOSSES |= {
    PAIRS: Loss(SeparateLossOverPairs, sgd=True),
    "center loss": Loss(CenterLoss, sgd=True),
    "center loss by gather": Loss(CenterLossByGather, sgd=True),
    "center loss by matrix": Loss(CenterLossByMatrix, sgd=True),
    "triplet, batch-hard": Loss(lambda *_: BatchHardTripletLoss()),
    "PML ProxyAnchor": Loss(partial(_pml, "ProxyAnchorLoss")),
    "PML CosFace": Loss(partial(_pml, "CosFaceLoss")),
    "PML ArcFace": Loss(partial(_pml, "ArcFaceLoss")),
    "cross-entropy head": Loss(partial(_Head, lambda _: nn.CrossEntropyLoss())),
}
