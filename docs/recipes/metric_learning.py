"""pytorch-metric-learning: the separate loss beside a triplet loss.

Both are called as `loss(embeddings, labels)`. Triplets compare
samples; the separate loss compares samples with centers. The centers
then classify, without a head.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import nn

from separate_loss import SeparateLoss, metrics

torch.manual_seed(0)
# The last layer is linear, so that embeddings can be negative.
model = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
)
miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
triplet = TripletMarginLoss(margin=0.2)
separate = SeparateLoss(NUM_CLASSES, feature_dim=16)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses, mined = [], []
for inputs, labels in batches(150):
    embeddings = model(inputs)
    triplets = miner(embeddings, labels)  # only for the triplet loss
    loss = triplet(embeddings, labels, triplets)
    loss = loss + separate(embeddings, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    mined.append(miner.num_triplets)

inputs, labels = batches(1, size=1280)[0]
with torch.no_grad():
    embeddings = model(inputs)
nearest = metrics.nearest_center(embeddings, separate.centers)
accuracy = float((nearest == labels).float().mean())
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(f"triplets mined: {mined[0]} to {mined[-1]}")
print(f"accuracy by nearest center {accuracy:.3f}")
