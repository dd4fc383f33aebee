"""A training loop of your own; the model returns features and logits.

Centers move only in training mode with gradients enabled.
"""

import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn
from torch.nn.functional import cross_entropy

from separate_loss import SeparateLoss, metrics

torch.manual_seed(0)
backbone = nn.Sequential(
    nn.Linear(PATTERN_SIZE, 64),
    nn.ReLU(),
    nn.Linear(64, 16),
)
head = nn.Linear(16, NUM_CLASSES)
separate = SeparateLoss(NUM_CLASSES, feature_dim=16)
parameters = [*backbone.parameters(), *head.parameters()]
optimizer = torch.optim.Adam(parameters, lr=3e-3)

for inputs, labels in batches(150):
    features = backbone(inputs)
    softmax = cross_entropy(head(features), labels)
    loss = softmax + separate(features, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

separate.eval()
statistics = metrics.ClassStatistics(NUM_CLASSES, feature_dim=16)
correct, total = 0, 0
with torch.no_grad():
    for inputs, labels in batches(20):
        features = backbone(inputs)
        statistics.update(features, labels)
        correct += int((head(features).argmax(-1) == labels).sum())
        total += len(labels)

accuracy = correct / total
means = statistics.class_centers()
agreement = float(metrics.center_agreement(separate.centers, means))
apart = float(metrics.inter_class_similarity(means))
print(f"accuracy {accuracy:.3f}, center agreement {agreement:.3f}")
print(f"cosine between class means {apart:.3f}")
