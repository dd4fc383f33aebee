"""`torch.compile` of a model, or of a step of model and loss."""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from separate_loss import SeparateLoss, SoftmaxSeparateLoss

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
)
head = nn.Linear(16, NUM_CLASSES)
model = nn.Sequential(backbone, head)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

# The model alone.
criterion = SoftmaxSeparateLoss(head)
compiled_model = torch.compile(model, fullgraph=True)

losses = []
for inputs, labels in batches(100):
    loss = criterion(compiled_model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
criterion.unwatch()

# Model and loss together, with the update of the centers.
separate = SeparateLoss(NUM_CLASSES, feature_dim=16)


@torch.compile(fullgraph=True)
def joint_loss(inputs: Tensor, labels: Tensor) -> Tensor:
    """Softmax and separate loss of a batch."""
    features = backbone(inputs)
    softmax = cross_entropy(head(features), labels)
    joint: Tensor = softmax + separate(features, labels)
    return joint


for inputs, labels in batches(100):
    loss = joint_loss(inputs, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
