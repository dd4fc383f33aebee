"""timm: watch the layer `get_classifier()`.

The features of a vision transformer can be negative. Those of a
ResNet, after ReLU and pooling, cannot: see neck.py.
"""

import timm
import torch
from data import NUM_CLASSES, batches

from separate_loss import SoftmaxSeparateLoss

torch.manual_seed(0)
model = timm.create_model(
    "test_vit",
    pretrained=False,  # True loads weights for the body
    num_classes=NUM_CLASSES,
    in_chans=1,
    img_size=(4, 8),
    patch_size=2,
)
# After any `reset_classifier`, which replaces the layer.
criterion = SoftmaxSeparateLoss(model.get_classifier())
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
