"""The separation of the centers: Eq. 3, and the squared form that is not in the paper.

With the sum s of the unit centers, their Gram matrix G, n of C centers that are not zero, and
a = 1 / (C - 1),

    L_inter = sum_{k != j} (c^_k . c^_j + 1) / (2 C (C - 1))                                (Eq. 3)
            = 1/2 + (||s||^2 - n) / (2 C (C - 1))

    Q = sum_{k != j} (c^_k . c^_j + a)^2 / (C (C - 1) (1 + a)^2)
      = (||G||^2 - n + 2 a (||s||^2 - n) + a^2 n (n - 1)) (C - 1) / C^3

A zero center has no direction. In Eq. 3 its cosines are 0; in Q it is in no pair.
"""

import torch
from torch import Tensor

from separate_loss._ops import clamp_value


def separation(
    center_sum: Tensor, gram: Tensor | None, num_nonzero: Tensor, num_classes: int
) -> Tensor:
    """L_inter, or with a Gram matrix Q; `num_nonzero` is a scalar of the type of the sum."""
    squared = center_sum.dot(center_sum)
    if gram is None:
        pairs = 2 * num_classes * (num_classes - 1)
        value = 0.5 + (squared - num_nonzero) / pairs
        return clamp_value(value, (num_classes - 2) / (2 * (num_classes - 1)), 1)
    a, scale = _square_constants(num_classes)
    pairs_of_nonzero = num_nonzero * (num_nonzero - 1)
    value = gram.square().sum() - num_nonzero + 2 * a * (squared - num_nonzero)
    return clamp_value((value + a * a * pairs_of_nonzero) * scale, 0, 1)


def _square_constants(num_classes: int) -> tuple[float, float]:
    """a, and 1 / (C (C - 1) (1 + a)^2)."""
    return 1 / (num_classes - 1), (num_classes - 1) / num_classes**3


def separation_gradient(
    center_sum: Tensor, gram: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `separation` for a unit center, but for a part along that center.

    The gradient is the vector (d,), plus, with a Gram matrix, the matrix by `gram_product`. Both
    hold the pair k = j as well, which adds nothing across the center.
    """
    if gram is None:
        return center_sum / (num_classes * (num_classes - 1)), None
    a, scale = _square_constants(num_classes)
    return center_sum * (4 * a * scale), gram * (4 * scale)


def count_nonzero(norms: Tensor) -> Tensor:
    """The number of centers that are not zero, a scalar of the type of the norms."""
    # A quotient of integers would be float32.
    return (norms != torch.inf).sum().to(norms.dtype)
