"""Activation checkpointing, with the loss outside of the region.

A checkpointed region runs twice, and a loss inside would move its
centers twice. The head may be inside with `use_reentrant=False`; the
other kind records no gradients.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from separate_loss import SoftmaxSeparateLoss


class Checkpointed(nn.Module):
    """Recomputes its body in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(PATTERN_SIZE, 64),
            nn.ReLU(),
            nn.Linear(64, 16),
        )
        self.head = nn.Linear(16, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        features = checkpoint(self.body, inputs, use_reentrant=False)
        logits: Tensor = self.head(features)
        return logits


torch.manual_seed(0)
model = Checkpointed()
criterion = SoftmaxSeparateLoss(model.head)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses = []
for inputs, labels in batches(150):
    loss = criterion(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
