"""Eq. 2, Eq. 3 and the simplex form, to be read beside the paper.

A hat is a vector over its norm; a vector without direction has cosine 0 with every other. With
the sum s of the unit centers, their Gram matrix G, n of C centers that are not zero, and
a = 1 / (n - 1),

    L_intra = sum_i (1 - x^_i . c^_{y_i}) / (2 m)                                       (Eq. 2)

    L_inter = sum_{k != j} (c^_k . c^_j + 1) / (2 C (C - 1))                            (Eq. 3)
            = 1/2 + (||s||^2 - n) / (2 C (C - 1))

    Q = sum_{k != j} (c^_k . c^_j + a)^2 / (n (n - 1) (1 + a)^2)                 (simplex form)
      = (||G||^2 + 2 a ||s||^2 - n - 2 a n + a^2 n (n - 1)) (n - 1) / n^3

Shapes: N samples, C classes, d features.
"""

import torch
from torch import Tensor

from separate_loss._checks import Reduction
from separate_loss._ops import clamp_value, least_norm

Number = Tensor | float


def normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (*, d) and norms (*), differentiable to any order.

    Zero and infinity for vectors that count as zero; NaN where a vector holds NaN or infinity.
    """
    # A norm has no derivative at zero: constant vectors take the place of zero ones.
    norms: Tensor = torch.linalg.vector_norm(vectors.detach(), dim=-1)
    zero = norms <= least_norm(vectors)
    norms = torch.linalg.vector_norm(vectors.masked_fill(zero.unsqueeze(-1), 1), dim=-1)
    norms = norms.masked_fill(zero, torch.inf)
    units: Tensor = vectors / norms.unsqueeze(-1)
    return units, norms


def scale_gradient(features: Tensor) -> Tensor:
    """The features (N, d), with a derivative that is their norms, held constant, times identity."""
    constant = features.detach()
    norms = torch.linalg.vector_norm(constant, dim=-1, keepdim=True)
    scaled: Tensor = constant + norms.nan_to_num(0, 0, 0) * (features - constant)
    return scaled


def intra_class(cosines: Tensor, sample_weight: Tensor | None) -> Tensor:
    """The summands of Eq. 2 (N,), from cosines times the sample weights."""
    weight = 1.0 if sample_weight is None else sample_weight
    return clamp_value((weight - cosines) / 2, 0, weight)


def inter_class(
    center_sum: Tensor, gram: Tensor | None, num_centers: Number, num_classes: int
) -> Tensor:
    """Eq. 3, or with a Gram matrix the simplex form."""
    n, squared = num_centers, center_sum.dot(center_sum)
    if gram is None:
        value = 0.5 + (squared - n) / (2 * num_classes * (num_classes - 1))
        return clamp_value(value, (num_classes - 2) / (2 * (num_classes - 1)), 1)
    a, scale = simplex_constants(n)
    value = gram.square().sum() + 2 * a * squared + (a * a * n * (n - 1) - n - 2 * a * n)
    return clamp_value(value * scale, 0, 1)


def simplex_constants(n: Number) -> tuple[Number, Number]:
    """a, and 1 / (n (n - 1) (1 + a)^2), which is 0 for fewer than two centers."""
    if isinstance(n, Tensor):
        others = (n - 1).clamp(min=0)
        return others.clamp(min=1).reciprocal(), others / n.clamp(min=1) ** 3
    return 1 / max(1, n - 1), max(0, n - 1) / max(1, n) ** 3


def reduce(
    intra: Tensor, sample_weight: Tensor | None, inter: Number, reduction: Reduction
) -> tuple[Tensor, Tensor, Number]:
    """The loss, the weighted mean of the summands of Eq. 2, and the sum of the weights."""
    total: Number = max(1, len(intra))
    if sample_weight is not None:
        total = sample_weight.sum()
        total = total.masked_fill(total == 0, 1)
    mean = intra.sum() / total
    if reduction == "mean":
        return mean + inter, mean, total
    each = intra + (inter if sample_weight is None else sample_weight * inter)
    return each if reduction == "none" else each.sum(), mean, total
