"""A ResNet with a neck: BatchNorm1d before the classifier.

Features after ReLU and pooling are never negative, and there centers
cannot point away from each other. The neck makes features signed and
similar in size. Watch the linear layer after it.
"""

import timm
import torch
from data import NUM_CLASSES, batches
from torch import nn

from separate_loss import SoftmaxSeparateLoss

torch.manual_seed(0)
model = timm.create_model(
    "test_resnet",
    pretrained=False,  # True loads weights for the body
    num_classes=NUM_CLASSES,
    in_chans=1,
)
neck = nn.BatchNorm1d(model.num_features)
model.fc = nn.Sequential(neck, model.fc)
criterion = SoftmaxSeparateLoss(model.fc[-1])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses = []
for inputs, labels in batches(150):
    images = inputs.reshape(-1, 1, 4, 8)
    loss = criterion(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
