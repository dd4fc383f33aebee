"""Small data for the recipes: seven noisy patterns."""

import torch
from torch import Tensor

NUM_CLASSES, PATTERN_SIZE = 7, 32


def batches(count: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Pairs of inputs (size, 32) and class indices (size,)."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(NUM_CLASSES, PATTERN_SIZE, generator=generator)
    drawn = []
    for _ in range(count):
        labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
        noise = torch.randn(size, PATTERN_SIZE, generator=generator)
        drawn.append((patterns[labels] + noise, labels))
    return drawn
