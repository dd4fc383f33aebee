"""Sharpness-aware minimisation (SAM): two passes per step.

The first pass moves the centers. The second runs with the loss in
evaluation mode: gradients flow, and the centers do not move.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn

from separate_loss import SoftmaxSeparateLoss

RADIUS = 0.05

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
    nn.Linear(16, NUM_CLASSES),
)
criterion = SoftmaxSeparateLoss(model[-1])
parameters = list(model.parameters())
optimizer = torch.optim.Adam(parameters, lr=3e-3)

losses = []
for inputs, labels in batches(150):
    loss = criterion(model(inputs), labels)
    climb = torch.autograd.grad(loss, parameters)
    norms = torch.stack([gradient.norm() for gradient in climb])
    steps = [RADIUS / norms.norm() * gradient for gradient in climb]
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.add_(step)

    optimizer.zero_grad()
    criterion.eval()
    criterion(model(inputs), labels).backward()
    criterion.train()

    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.sub_(step)
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
