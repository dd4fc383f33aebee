"""Adds the separate loss to pytorch-metric-learning's triplet loss with one of its miners.

Both losses are called as `loss(embeddings, labels)`. Triplets compare single samples; the separate
loss compares samples with centers. The centers then classify, without a head.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import nn

from separate_loss import SeparateLoss
from separate_loss.functional import similarity

torch.manual_seed(0)
# The last layer is linear, so embeddings can be negative, as the separate loss requires.
model = nn.Sequential(nn.Linear(PATTERN_SIZE, 64), nn.ReLU(), nn.Linear(64, 16))
miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
triplet = TripletMarginLoss(margin=0.2)
separate = SeparateLoss(NUM_CLASSES, feature_dim=16)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

losses, mined = [], []
for inputs, labels in batches(150):
    embeddings = model(inputs)
    triplets = miner(embeddings, labels)  # only for the triplet loss
    loss = triplet(embeddings, labels, triplets) + separate(embeddings, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    mined.append(miner.num_triplets)

correct, total = 0, 0
with torch.no_grad():
    for inputs, labels in batches(20):
        nearest = similarity(model(inputs).unsqueeze(1), separate.centers).argmax(-1)
        correct += int((nearest == labels).sum())
        total += len(labels)

accuracy = correct / total
print(
    f"loss {losses[0]:.3f} to {losses[-1]:.3f}, triplets mined {mined[0]} to {mined[-1]}, "
    f"accuracy by nearest center {accuracy:.3f}"
)
