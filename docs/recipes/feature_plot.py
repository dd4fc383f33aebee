"""t-SNE and TensorBoard's projector, with class means and centers.

All are unit vectors in one embedding, since the loss sees directions.
A center far from its class mean is one that features cannot reach.
"""

from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt
import torch
from data import NUM_CLASSES, PATTERN_SIZE, batches
from sklearn.manifold import TSNE
from torch import nn
from torch.nn.functional import normalize

from separate_loss import SoftmaxSeparateLoss, metrics
from separate_loss.plots import feature_space

torch.manual_seed(0)
backbone = nn.Sequential(nn.Linear(PATTERN_SIZE, 64), nn.Tanh())
head = nn.Linear(64, NUM_CLASSES)
criterion = SoftmaxSeparateLoss(head)
model = nn.Sequential(backbone, head)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for inputs, labels in batches(150):
    loss = criterion(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

inputs, labels = batches(1, size=500)[0]
with torch.no_grad():
    features = backbone(inputs)
means = metrics.class_centers(features, labels, NUM_CLASSES).float()
rows = torch.cat([features, means, criterion.separate.centers])
rows, count = normalize(rows), len(features)

plane = torch.as_tensor(TSNE(metric="cosine").fit_transform(rows))
points, true, learned = plane.split([count, *2 * [NUM_CLASSES]])
folder = Path(mkdtemp())
feature_space(
    points,
    labels,
    true_centers=true,
    learned_centers=learned,
)
plt.savefig(folder / "features.png")

# For the projector, run `tensorboard --logdir` with this folder.
names = [f"sample {label}" for label in labels.tolist()]
names += [f"mean {label}" for label in range(NUM_CLASSES)]
names += [f"center {label}" for label in range(NUM_CLASSES)]
lines = ["\t".join(map(str, row)) for row in rows.tolist()]
(folder / "vectors.tsv").write_text("\n".join(lines))
(folder / "names.tsv").write_text("\n".join(names))
files = 'tensor_path: "vectors.tsv" metadata_path: "names.tsv"'
config = f'embeddings {{ tensor_name: "features" {files} }}'
(folder / "projector_config.pbtxt").write_text(config)
print(f"written to {folder}")
