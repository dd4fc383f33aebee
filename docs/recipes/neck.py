"""A ResNet, whose features end in ReLU and pooling, with a neck: BatchNorm1d before the classifier.

The neck makes features signed and similar in size. Watch the linear layer after it. A pretrained
network with a neck gained with weights of 0.1 to 1, and lost with 3.
"""

import timm
import torch
from data import NUM_CLASSES, batches
from torch import nn

from separate_loss import SoftmaxSeparateLoss

torch.manual_seed(0)
model = timm.create_model("test_resnet", pretrained=False, num_classes=NUM_CLASSES, in_chans=1)
model.fc = nn.Sequential(nn.BatchNorm1d(model.num_features), model.fc)
criterion = SoftmaxSeparateLoss(model.fc[-1], separate_weight=0.3)
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
