"""Separations that could take the place of Eq. 3, in closed form, and a loss of each.

docs/beyond.md derives them. N samples, C classes, d features; units (N, d) are the directions of
features, directions (C, d) those of centers, shares (N,) the samples' weights, which sum to 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import functional

Separation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
TEMPERATURE = 0.1
MOMENTUM = 0.1  # of the running mean of features


def own_cosines(units: Tensor, target: Tensor, directions: Tensor) -> Tensor:
    """Of each sample to the center of its class, (N,)."""
    return (units * directions.index_select(0, target)).sum(-1)


def centers(_: Tensor, __: Tensor, directions: Tensor, ___: Tensor) -> Tensor:
    """Eq. 3."""
    return functional.inter_class_loss(directions)


def samples(units: Tensor, target: Tensor, directions: Tensor, shares: Tensor) -> Tensor:
    """The mean similarity of samples to the other classes' centers, in O((N + C) d)."""
    others = units @ directions.sum(0) - own_cosines(units, target, directions)
    return (1 + shares @ others / (len(directions) - 1)) / 2


def samples_and_centers(
    units: Tensor, target: Tensor, directions: Tensor, shares: Tensor
) -> Tensor:
    """Half of each, so that it lies in [0, 1] as they do."""
    both = samples, centers
    return torch.stack([one(units, target, directions, shares) for one in both]).mean()


def square_centers(_: Tensor, __: Tensor, directions: Tensor, ___: Tensor) -> Tensor:
    """The squared separation of the package."""
    return functional.inter_class_loss(directions, separation="square")


def square_samples(units: Tensor, target: Tensor, directions: Tensor, shares: Tensor) -> Tensor:
    """Squared as well, of samples to the other classes' centers, in O((N + C) d^2)."""
    count = len(directions)
    simplex = 1 / (count - 1)
    squares = (units @ (directions.T @ directions) * units).sum(-1)
    cosines = units @ directions.sum(0)
    own = own_cosines(units, target, directions)
    others = squares + 2 * simplex * cosines + count * simplex**2 - (own + simplex).square()
    return shares @ others / (count - 1) / (1 + simplex) ** 2


def soft_maximum(units: Tensor, target: Tensor, directions: Tensor, shares: Tensor) -> Tensor:
    """The log-mean-exp of cosines to the other classes' centers, moved to [0, 1].

    O(N C d) as a linear layer is; here from the (N, C) matrix, which a fused pass would spare.
    """
    own = F.one_hot(target, len(directions)).bool()
    cosines = (units @ directions.T).masked_fill(own, -torch.inf)
    others = torch.logsumexp(cosines / TEMPERATURE, -1) - math.log(len(directions) - 1)
    return (1 + TEMPERATURE * (shares @ others)) / 2


SEPARATIONS: dict[str, Separation] = {
    "centers": centers,
    "samples": samples,
    "samples and centers": samples_and_centers,
    "square of centers": square_centers,
    "square of samples": square_samples,
    "soft maximum": soft_maximum,
}


class Candidate(nn.Module):
    """Eq. 2 plus a separation, with centers for an optimizer to move.

    Args:
        separation: a name of `SEPARATIONS`.
        centers: where they start, (C, d).
        weight: of each class, (C,), for the means over samples; None weighs all alike.
        centred: takes a running mean off the features, through which no gradient flows. Centers
            then stand for what is left.
    """

    weight: Tensor
    mean: Tensor

    def __init__(
        self,
        separation: str,
        centers: Tensor,
        *,
        weight: Tensor | None = None,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.separation = SEPARATIONS[separation]
        self.centers = nn.Parameter(centers)
        self.centred = centred
        self.fresh = True
        self.register_buffer("weight", torch.ones(len(centers)) if weight is None else weight)
        self.register_buffer("mean", torch.zeros_like(centers[0]))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        if self.centred:
            self._follow(features.detach())
        units = F.normalize(features - self.mean, dim=-1)
        directions = F.normalize(self.centers, dim=-1)
        shares = self.weight[target] / self.weight[target].sum()
        intra = (1 - shares @ own_cosines(units, target, directions)) / 2
        return intra + self.separation(units, target, directions, shares)

    def _follow(self, features: Tensor) -> None:
        if self.training:
            self.mean = self.mean.lerp(features.mean(0), 1.0 if self.fresh else MOMENTUM)
            self.fresh = False
