"""The separation of the centers: Eq. 3, and the simplex form, which is not in the paper.

With the sum s of the unit centers, their Gram matrix G, n of C centers that are not zero, and
a = 1 / (n - 1),

    L_inter = sum_{k != j} (c^_k . c^_j + 1) / (2 C (C - 1))                                (Eq. 3)
            = 1/2 + (||s||^2 - n) / (2 C (C - 1))

    Q = sum_{k != j} (c^_k . c^_j + a)^2 / (n (n - 1) (1 + a)^2)
      = (||G||^2 - n + 2 a (||s||^2 - n) + a^2 n (n - 1)) (n - 1) / n^3

A zero center has no direction. In Eq. 3 its cosines are 0; in Q it is in no pair.
"""

import torch
from torch import Tensor

from separate_loss._ops import clamp_value


def inter_class(
    center_sum: Tensor, gram: Tensor | None, num_centers: Tensor, num_classes: int
) -> Tensor:
    """L_inter, or with a Gram matrix Q; `num_centers` is n, a scalar."""
    squared = center_sum.dot(center_sum)
    n = num_centers.to(squared.dtype)
    if gram is None:
        value = 0.5 + (squared - n) / (2 * num_classes * (num_classes - 1))
        return clamp_value(value, (num_classes - 2) / (2 * (num_classes - 1)), 1)
    a, scale = _simplex_constants(n)
    value = gram.square().sum() - n + 2 * a * (squared - n) + a * a * n * (n - 1)
    return clamp_value(value * scale, 0, 1)


def _simplex_constants(n: Tensor) -> tuple[Tensor, Tensor]:
    """a, and 1 / (n (n - 1) (1 + a)^2), which is 0 for fewer than two centers."""
    others = (n - 1).clamp(min=0)
    return others.clamp(min=1).reciprocal(), others / n.clamp(min=1) ** 3


def inter_class_gradient(
    center_sum: Tensor, gram: Tensor | None, num_centers: Tensor, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `inter_class` for a unit center, but for a part along that center.

    The gradient is the vector (d,), plus, with a Gram matrix, the matrix by `gram_product`. Both
    hold the pair k = j as well, which adds nothing across the center.
    """
    if gram is None:
        return center_sum / (num_classes * (num_classes - 1)), None
    a, scale = _simplex_constants(num_centers.to(center_sum.dtype))
    return center_sum * (4 * a * scale), gram * (4 * scale)


def count_centers(norms: Tensor) -> Tensor:
    """The number of centers that are not zero, a scalar."""
    return (norms != torch.inf).sum()
