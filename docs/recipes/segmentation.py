"""Segmentation: the loss and the metrics on maps of features.

`SeparateLoss` takes features with d in the last dimension, so that
maps need `movedim(1, -1)`. Each pixel counts as a sample.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from separate_loss import SeparateLoss, metrics

UNLABELLED = 255

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Conv2d(PATTERN_SIZE, 64, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(64, 16, 1),
)
head = nn.Conv2d(16, NUM_CLASSES, 1)
model = nn.Sequential(backbone, head)
separate = SeparateLoss(NUM_CLASSES, 16, ignore_index=UNLABELLED)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)


def scenes(count: int) -> list[tuple[Tensor, Tensor]]:
    """Pictures (4, 32, 8, 8), and labels (4, 8, 8)."""
    drawn = []
    for pixels, classes in batches(count, size=4 * 8 * 8):
        pictures = pixels.view(4, 8, 8, PATTERN_SIZE).movedim(-1, 1)
        labels = classes.view(4, 8, 8)
        labels[:, 0] = UNLABELLED
        drawn.append((pictures, labels))
    return drawn


losses = []
data = scenes(155)
for pictures, labels in data[:150]:
    features = backbone(pictures)
    logits = head(features)
    softmax = cross_entropy(logits, labels, ignore_index=UNLABELLED)
    loss = softmax + separate(features.movedim(1, -1), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

pictures, labels = map(torch.cat, zip(*data[150:], strict=True))
with torch.no_grad():
    features = backbone(pictures).movedim(1, -1)
labelled = labels != UNLABELLED
nearest = metrics.nearest_center(features, separate.centers)
accuracy = float((nearest == labels)[labelled].float().mean())
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"pixels right by nearest center: {accuracy:.3f}")
