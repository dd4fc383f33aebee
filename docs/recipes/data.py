"""Small data for the recipes: seven noisy patterns."""

from typing import Any

import torch
from torch import Tensor

NUM_CLASSES, PATTERN_SIZE = 7, 32
Batches = list[tuple[Tensor, Tensor]]
Examples = list[dict[str, Any]]


def batches(count: int, size: int = 64) -> Batches:
    """Pairs of inputs (size, 32) and class indices (size,)."""
    generator = torch.Generator().manual_seed(0)
    shape = NUM_CLASSES, PATTERN_SIZE
    patterns = torch.randn(shape, generator=generator)
    drawn = []
    for _ in range(count):
        labels = torch.randint(7, (size,), generator=generator)
        noise = torch.randn(size, PATTERN_SIZE, generator=generator)
        drawn.append((patterns[labels] + noise, labels))
    return drawn


def pictures(count: int) -> Examples:
    """Pictures (1, 4, 8) with labels, as Hugging Face takes them."""
    inputs, labels = batches(1, size=count)[0]
    return named("pixel_values", inputs.view(-1, 1, 4, 8), labels)


def texts(count: int) -> Examples:
    """Texts of 12 tokens out of 32, as a tokenizer returns them."""
    inputs, labels = batches(1, size=count)[0]
    return named("input_ids", inputs.topk(12).indices, labels)


def named(name: str, rows: Tensor, labels: Tensor) -> Examples:
    """Each row under its name, with its label."""
    pairs = zip(rows, labels, strict=True)
    return [{name: row, "labels": label} for row, label in pairs]
