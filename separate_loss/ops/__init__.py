"""Center-similarity operators, each with a closed-form gradient, which `functional` stands on.

Every device is served by the eager form.
"""

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
    "matmul",
    "move_by_sums_",
    "norms_and_total",
    "pull_by_index_",
    "push_apart_",
    "unit",
    "within",
]
