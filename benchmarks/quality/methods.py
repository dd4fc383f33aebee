"""The losses that are compared, and what each may choose from when it is tuned."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.baselines import BatchHardTripletLoss, CenterLoss, IslandLoss
from benchmarks.quality.settings import PAPER_WEIGHT
from separate_loss import SeparateLoss, functional


class Problem(NamedTuple):
    """What a loss is built for."""

    counts: Tensor  # of each class's training samples, (C,)
    dim: int  # of the features
    strength: float

    @property
    def classes(self) -> int:
        return len(self.counts)


Build = Callable[[Problem], nn.Module | None]


COSFACE_SCALE = 16


class Method(NamedTuple):
    """How a loss is built, and the weights (or margins) that it is tuned from, if it is.

    Parameters of the criterion are moved by plain SGD at `center_rate`; without one, by the
    network's own optimizer.
    """

    build: Build
    strengths: tuple[float, ...] = ()
    center_rate: float | None = None
    is_head: bool = False  # takes the place of the linear layer and of softmax loss
    inter_share: float = 1.0  # of Eq. 3


class CosineHead(nn.Module):
    """The scaled cosines of a margin loss, as logits."""

    def __init__(self, criterion: CosFaceLoss) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.criterion.get_logits(features)
        return logits


def _cosface(problem: Problem) -> nn.Module:
    criterion: nn.Module = CosFaceLoss(
        problem.classes, problem.dim, margin=problem.strength, scale=COSFACE_SCALE
    )
    return criterion


def _paper(problem: Problem) -> nn.Module:
    return SeparateLoss(problem.classes, problem.dim, center_lr=10.0)


def _slow(problem: Problem) -> nn.Module:
    return SeparateLoss(problem.classes, problem.dim, center_init="uniform", center_lr=0.01)


def _gradient(problem: Problem) -> nn.Module:
    return SeparateLoss(problem.classes, problem.dim, center_update="gradient")


def balance(problem: Problem) -> Tensor:
    """Each class pulls its center as much as any other, however few its samples are."""
    return problem.counts.sum() / (problem.classes * problem.counts)


def _balanced(problem: Problem) -> nn.Module:
    weight = balance(problem)
    return SeparateLoss(problem.classes, problem.dim, center_update="gradient", weight=weight)


class WeakInter(nn.Module):
    """Eq. 4 with less of Eq. 3 and with class weights; centers for an optimizer to move."""

    def __init__(self, problem: Problem, share: float) -> None:
        super().__init__()
        self.share = share
        self.weight = balance(problem)
        centers = torch.randn(problem.classes, problem.dim)
        self.centers = nn.Parameter(F.normalize(centers, dim=-1))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        intra = functional.intra_class_loss(features, target, self.centers, weight=self.weight)
        return intra + self.share * functional.inter_class_loss(self.centers)


def _weak_inter(share: float, problem: Problem) -> nn.Module:
    return WeakInter(problem, share)


WEIGHTS = (0.1, 0.3, PAPER_WEIGHT)
CENTER_WEIGHTS = (0.001, 0.01, 0.1)

METHODS: dict[str, Method] = {
    "softmax": Method(lambda _: None),
    "center": Method(lambda it: CenterLoss(it.classes, it.dim), CENTER_WEIGHTS, center_rate=0.5),
    "island": Method(lambda it: IslandLoss(it.classes, it.dim), CENTER_WEIGHTS, center_rate=0.5),
    "triplet": Method(lambda _: BatchHardTripletLoss(), (0.03, 0.1, 0.3)),
    "cosface": Method(_cosface, (0.1, 0.2, 0.35), is_head=True),
    "separate": Method(_paper, WEIGHTS),
    "gradient": Method(_gradient, WEIGHTS, center_rate=1.0),
    "balanced": Method(_balanced, center_rate=1.0),
    "slow": Method(_slow),
}
# The same, with centers moved otherwise: by SGD at another rate, or in the network's optimizer.
CENTER_RATES: dict[str, float | None] = {"SGD 0.1": 0.1, "SGD 10": 10.0, "Adam": None}
METHODS |= {
    f"gradient, {label}": Method(_gradient, center_rate=rate)
    for label, rate in CENTER_RATES.items()
}

# The same with less of Eq. 3, down to where centers cease to push.
INTER_SHARES = (0.3, 0.5, 0.7)
METHODS |= {
    f"balanced, inter x {share}": Method(
        partial(_weak_inter, share), center_rate=1.0, inter_share=share
    )
    for share in INTER_SHARES
}
