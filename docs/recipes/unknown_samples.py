"""Unknown samples, rejected by the cosine of their nearest center.

A sample is rejected if the cosine of its nearest center is below that
of 95 % of held-out samples of known classes. Compare with the largest
probability on your data.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss, metrics

KNOWN = 7

torch.manual_seed(0)
pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
inputs, labels = pixels.float() / 16, digits
seen = torch.arange(len(labels)) < 900
training = (seen & (labels < KNOWN)).nonzero().squeeze(1)

backbone = nn.Sequential(
    nn.Linear(64, 128),
    nn.ReLU(),
    nn.Linear(128, 32),
)
head = nn.Linear(32, KNOWN)
model = nn.Sequential(backbone, head)
criterion = SoftmaxSeparateLoss(head)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
losses = []
for _ in range(20):
    shuffled = training[torch.randperm(len(training))]
    for batch in shuffled.split(32):
        loss = criterion(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

with torch.no_grad():
    features = backbone(inputs[~seen])
    probabilities = head(features).softmax(-1).amax(-1)
centers, known = criterion.separate.centers, labels[~seen] < KNOWN
found = metrics.nearest_center(features, centers, return_cosines=True)


def rejected(scores: Tensor) -> float:
    """The share of unknown samples below 95 % of known ones."""
    threshold = scores[known].quantile(0.05)
    return float((scores[~known] < threshold).float().mean())


by_center, by_softmax = rejected(found[1]), rejected(probabilities)
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"unknown samples rejected by nearest center: {by_center:.2f}")
print(f"by largest probability: {by_softmax:.2f}")
