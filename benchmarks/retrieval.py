"""Classes that were not trained on, found by cosine: `python -m benchmarks retrieval`.

The demo's network learns seven of scikit-learn's ten digits; the other three are retrieved by the
cosines of their features. MAP@R: of the R others of a sample's class, how many are among its R
nearest, and how early. Three digits are drawn anew for each split. Nothing is tuned.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import training
from benchmarks.baselines import CenterLoss
from benchmarks.digits import FEATURE_DIM, NUM_CLASSES, DigitClassifier, FeatureKind, load_split
from benchmarks.report import environment, progress, provenance, table, write
from benchmarks.training import Loss, Split, joint
from separate_loss import SeparateLoss

__all__ = ["main", "map_at_r"]

SEEN = 7
KINDS: tuple[FeatureKind, ...] = ("signed", "neck")
METHODS = {
    "softmax": "softmax loss",
    "center": "+ 0.1 x center loss",
    "paper": "+ 0.9 x separate loss, paper's form",
    "square": '+ 0.9 x separate loss, `scale_free`, `"square"`',
    "cosface": "CosFace head, margin 0.35, scale 16",
}


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains on each split and writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks retrieval", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("build/retrieval.md"))
    options = parser.parse_args(arguments)
    if options.splits < 2:
        parser.error("--splits must be at least 2, for a deviation")
    cells = list(product(METHODS, KINDS))
    values: dict[tuple[str, str], list[float]] = {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        running = [
            [pool.submit(run, *cell, split, options.epochs) for split in range(options.splits)]
            for cell in cells
        ]
        for number, (cell, futures) in enumerate(zip(cells, running, strict=True), 1):
            values[cell] = [100 * future.result() for future in futures]
            progress(number, len(cells), f"{' | '.join(cell)} | {fmean(values[cell]):.1f}")
    found = {
        (method, kind): _shown(method, values[method, kind], values["softmax", kind])
        for method, kind in cells
    }
    rows = [[title, *(found[method, kind] for kind in KINDS)] for method, title in METHODS.items()]
    header = ["MAP@R, %", "signed features", "non-negative, then a neck"]
    write(options.output, f"{table(header, rows)}\n\n{provenance(environment())}\n")
    print(f"Table: {options.output}")


def _shown(method: str, values: list[float], softmax: list[float]) -> str:
    """The mean, and how far from softmax loss on the same splits."""
    if method == "softmax":
        return f"{fmean(values):.1f}"
    differences = [one - other for one, other in zip(values, softmax, strict=True)]
    return f"{fmean(values):.1f} ({fmean(differences):+.1f} ± {stdev(differences):.1f})"


def run(method: str, kind: FeatureKind, split: int, epochs: int) -> float:
    """Trains once, on one thread, and retrieves the unseen digits."""
    torch.set_num_threads(1)
    order = torch.randperm(NUM_CLASSES, generator=torch.Generator().manual_seed(split))
    halves = load_split(0)
    data = Split(*(torch.cat(parts) for parts in zip(*halves, strict=True)))
    label = order.argsort()[data.labels]
    seen = label < SEEN
    torch.manual_seed(split)
    model = DigitClassifier(kind)
    model.classifier = nn.Linear(FEATURE_DIM, SEEN)
    loss, moving = _objective(method, model)
    for _ in training.train(
        model,
        Split(data.images[seen], label[seen]),
        loss,
        moving,
        epochs=epochs,
        batch_size=32,
        seed=split,
    ):
        pass
    model.eval()
    with torch.no_grad():
        features = model(data.images[~seen])[0]
    return map_at_r(features, label[~seen])


def _objective(method: str, model: nn.Module) -> tuple[Loss, list[torch.optim.Optimizer]]:
    if method == "cosface":
        head: Any = CosFaceLoss(SEEN, FEATURE_DIM, margin=0.35, scale=16)
        adam = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-3)
        return (lambda features, _, labels: head(features, labels)), [adam]
    moving: list[torch.optim.Optimizer] = [torch.optim.Adam(model.parameters(), lr=1e-3)]
    if method == "softmax":
        return joint(None, 0.0), moving
    if method == "center":
        centers = CenterLoss(SEEN, FEATURE_DIM)
        moving.append(torch.optim.SGD(centers.parameters(), lr=0.5))
        return joint(centers, 0.1), moving
    options: dict[str, Any] = {"scale_free": True, "separation": "square"}
    criterion = SeparateLoss(SEEN, FEATURE_DIM, **(options if method == "square" else {}))
    return joint(criterion, 0.9), moving


def map_at_r(features: Tensor, labels: Tensor) -> float:
    """The mean, over samples, of the precision at each right one of the R nearest, over R."""
    units = F.normalize(features.double(), dim=-1)
    cosines = (units @ units.T).fill_diagonal_(-torch.inf)
    nearest = labels[cosines.argsort(dim=-1, descending=True)[:, :-1]]
    right = nearest == labels.unsqueeze(-1)
    relevant = right.sum(-1, keepdim=True)
    place = torch.arange(1, right.shape[1] + 1)
    precision = right.cumsum(-1) / place * right * (place <= relevant)
    return (precision.sum(-1) / relevant.squeeze(-1)).mean().item()
