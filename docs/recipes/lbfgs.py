"""An optimizer that evaluates the loss many times per step: L-BFGS.

Within a step the loss is in evaluation mode, so the centers are fixed
and the optimizer minimises one function. After the step, one pass
moves the centers.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.Tanh(),
    nn.Linear(64, 16),
    nn.Linear(16, NUM_CLASSES),
)
criterion = SoftmaxSeparateLoss(model[-1])
optimizer = torch.optim.LBFGS(
    model.parameters(),
    max_iter=5,
    line_search_fn="strong_wolfe",
)
inputs, labels = batches(1, size=512)[0]


def closure() -> Tensor:
    """The loss and its gradient, under the centers as they are."""
    optimizer.zero_grad()
    loss: Tensor = criterion(model(inputs), labels)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    loss = criterion(model(inputs), labels)  # moves the centers
    losses.append(loss.item())
    criterion.eval()
    optimizer.step(closure)
    criterion.train()

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
