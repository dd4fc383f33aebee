"""Trains a digit classifier with and without the separate loss: a table and a picture.

python -m benchmarks.demo
"""

import argparse
import math
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits import (
    FEATURE_DIM,
    NUM_CLASSES,
    DigitClassifier,
    Figures,
    Trained,
    evaluate,
    load_split,
    train,
)
from separate_loss import SeparateLoss, metrics, plots

SEPARATE_WEIGHT = 0.9
BATCH_SIZE = 32

METHODS = {
    "softmax": "softmax loss",
    "separate": f"softmax + {SEPARATE_WEIGHT} x separate loss",
}


def run(method: str, seed: int, epochs: int) -> Trained:
    """Trains one model; both methods start from the same weights and see the same batches."""
    training, test = load_split(seed)
    torch.manual_seed(seed)
    model = DigitClassifier()
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM) if method == "separate" else None
    steps = train(
        model,
        training,
        criterion,
        separate_weight=SEPARATE_WEIGHT,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    for epoch in steps:
        print(f"\rseed {seed}, {METHODS[method]}: epoch {epoch + 1}/{epochs}", end="", flush=True)
    trained = evaluate(model, test, criterion)
    print(f", accuracy {trained.figures.accuracy:.2f} %", flush=True)
    return trained


def table(results: dict[str, list[Figures]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = [
        "| loss | accuracy, % | intra-class similarity | inter-class similarity "
        "| center agreement |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, runs in results.items():
        cells = [METHODS[method]]
        for name, digits in zip(Figures._fields, (2, 3, 3, 3), strict=True):
            values = [getattr(figures, name) for figures in runs]
            if math.isnan(values[0]):
                cells.append("-")
                continue
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_the_plane(*parts: Tensor) -> list[Tensor]:
    """One t-SNE of all parts by their directions, which are what the loss sees."""
    rows = F.normalize(torch.cat([part.double() for part in parts]), dim=-1)
    plane = TSNE(perplexity=30, init="pca", random_state=0).fit_transform(rows.numpy())
    return list(torch.from_numpy(plane).split([len(part) for part in parts]))


def picture(trained: dict[str, Trained], path: Path) -> None:
    """The feature spaces of all methods side by side, and how similar their class means are."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(5, 3))
    upper, lower = parts
    panels = upper.subplots(1, len(trained)), lower.subplots(1, len(trained))
    for axes, matrix, (method, result) in zip(*panels, trained.items(), strict=True):
        true_centers = metrics.class_centers(result.features, result.labels, NUM_CLASSES)
        centers = [true_centers] if result.centers is None else [true_centers, result.centers]
        points, *marked = in_the_plane(result.features, *centers)
        plots.feature_space(
            points,
            result.labels,
            true_centers=marked[0],
            learned_centers=marked[1] if len(marked) > 1 else None,
            axes=axes,
        )
        figures = result.figures
        axes.set_title(
            f"{METHODS[method]}: accuracy {figures.accuracy:.1f} %\n"
            f"mean cosine within classes {figures.intra:.2f}, between classes {figures.inter:.2f}",
            fontsize=11,
        )
        plots.center_similarity(true_centers, axes=matrix)
        matrix.set_title("cosines between class means", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")

    # The model is so small that threads would spend their time waiting for one another.
    torch.set_num_threads(1)
    began = time.perf_counter()
    results: dict[str, list[Figures]] = {method: [] for method in METHODS}
    first: dict[str, Trained] = {}
    for seed in range(options.seeds):
        for method in METHODS:
            trained = run(method, seed, options.epochs)
            results[method].append(trained.figures)
            first.setdefault(method, trained)
    print(
        f"\nscikit-learn's digits, half of them unseen; mean ± deviation of {options.seeds} seeds"
    )
    print(table(results))
    picture(first, options.output)
    print(f"\nPicture: {options.output} ({time.perf_counter() - began:.0f} s in all)")


if __name__ == "__main__":
    main()
