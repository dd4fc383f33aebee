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
    unit,
    within,
)

__all__ = [
    "class_sums",
    "compare",
    "fewer_classes",
    "inter",
    "inter_by_count",
    "kernels_for",
    "matmul",
    "may_fuse",
    "move_by_sums_",
    "norms_and_total",
    "pull_by_index_",
    "push_apart_",
    "unit",
    "within",
]
