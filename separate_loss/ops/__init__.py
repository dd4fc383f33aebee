"""Center-similarity operators, each with a closed-form gradient, which `functional` stands on.

The eager form serves every device; `kernels_for` says where one step in fused kernels may instead.
"""

from separate_loss.ops.dispatch import kernels_for, may_fuse
from separate_loss.ops.eager import (
    class_sums,
    compare,
    fewer_classes,
    inter,
    inter_by_count,
    matmul,
    move_by_sums_,
    norms_and_total,
    pull_by_index_,
    push_apart_,
    push_of,
    rate_for,
    scale_free,
    unit,
    within,
)
from separate_loss.ops.square import (
    by_dims,
    gram,
    push_apart_by_,
    push_of_square,
    square,
    square_of,
)

__all__ = [
    "by_dims",
    "class_sums",
    "compare",
    "fewer_classes",
    "gram",
    "inter",
    "inter_by_count",
    "kernels_for",
    "matmul",
    "may_fuse",
    "move_by_sums_",
    "norms_and_total",
    "pull_by_index_",
    "push_apart_",
    "push_apart_by_",
    "push_of",
    "push_of_square",
    "rate_for",
    "scale_free",
    "square",
    "square_of",
    "unit",
    "within",
]
