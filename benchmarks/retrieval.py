"""Classes that were not trained on, found by cosine: `python -m benchmarks retrieval`.

The study's network learns seven of scikit-learn's ten digits; the other three are retrieved by the
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

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits import NUM_CLASSES, load_split
from benchmarks.quality.data import Sides
from benchmarks.quality.methods import PAPER_WEIGHT, WEIGHT
from benchmarks.quality.runs import Setting, outputs, start
from benchmarks.report import environment, progress, provenance, table, write
from benchmarks.samples import FeatureKind, Split

__all__ = ["main", "map_at_r"]

SEEN, BATCH_SIZE, RATE = 7, 32, 0.003
KINDS: tuple[FeatureKind, ...] = ("signed", "neck")
# Of each, its weight (or margin) and its title.
METHODS = {
    "softmax": (0.0, "softmax loss"),
    "center": (0.1, "+ 0.1 x center loss"),
    "paper": (PAPER_WEIGHT, f"+ {PAPER_WEIGHT} x separate loss, paper's form"),
    "square": (WEIGHT, f'+ {WEIGHT:g} x separate loss, `scale_free`, `"square"`'),
    "cosface": (0.35, "CosFace, margin 0.35, scale 16"),
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
    rows = [
        [title, *(found[method, kind] for kind in KINDS)] for method, (_, title) in METHODS.items()
    ]
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
    training = Split(data.images[seen], label[seen])
    weight = METHODS[method][0]
    setting = Setting("digits", kind, method, weight, RATE, split, epochs, BATCH_SIZE)
    started = start(setting, sides=Sides(training, training))
    for _ in started.epochs:
        pass
    features, _ = outputs(started.model, data.images[~seen])
    return map_at_r(features, label[~seen])


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
