"""Automatic mixed precision with a gradient scaler.

The loss computes in float32 under autocast. If a batch overflows, its
loss is not finite, the scaler skips the step, and the samples that
overflowed do not move the centers.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn

from separate_loss import SoftmaxSeparateLoss

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
    nn.Linear(16, NUM_CLASSES),
).to(device)
criterion = SoftmaxSeparateLoss(model[-1])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device)

losses = []
for step, (inputs, labels) in enumerate(batches(150)):
    if step == 50:
        inputs[0] = torch.inf  # only this step is skipped
    with torch.autocast(device, dtype=torch.float16):
        loss = criterion(model(inputs.to(device)), labels.to(device))
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())

centers_finite = bool(criterion.separate.centers.isfinite().all())
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"centers finite: {centers_finite}")
