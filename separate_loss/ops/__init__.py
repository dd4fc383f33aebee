"""Center-similarity operators, each with a closed-form gradient, which `functional` stands on.

Every device is served by the eager form.
"""

from separate_loss.ops.eager import matmul, move_centers, unit, unit_rows

__all__ = ["matmul", "move_centers", "unit", "unit_rows"]
