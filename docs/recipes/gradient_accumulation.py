"""Gradients of several small batches for one step of the optimizer.

Each small batch moves the centers, as it moves BatchNorm's
statistics. Its gradients are computed with the centers before that
move.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn

from separate_loss import SoftmaxSeparateLoss

ACCUMULATED = 4

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
    nn.Linear(16, NUM_CLASSES),
)
criterion = SoftmaxSeparateLoss(model[-1])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses = []
for step, (inputs, labels) in enumerate(batches(400, size=16), 1):
    loss = criterion(model(inputs), labels)
    (loss / ACCUMULATED).backward()
    losses.append(loss.item())
    if step % ACCUMULATED == 0:
        optimizer.step()
        optimizer.zero_grad()

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
