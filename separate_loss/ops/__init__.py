"""Center-similarity operators, each with a closed-form gradient, which `functional` stands on.

Every device is served by the eager form.
"""

from separate_loss.ops.eager import (
    matmul,
    pull_by_index,
    pull_by_probability,
    push_apart,
    unit,
    unit_rows,
)

__all__ = ["matmul", "pull_by_index", "pull_by_probability", "push_apart", "unit", "unit_rows"]
