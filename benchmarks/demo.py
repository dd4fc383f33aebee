"""Trains a digit classifier with and without the separate loss: a table and a picture.

python -m benchmarks.demo
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.methods import PAPER_WEIGHT, WEIGHT
from benchmarks.quality.runs import Figures, Setting, Training, figures, outputs, start
from benchmarks.quality.statistics import show_spread
from benchmarks.report import table
from separate_loss import metrics, plots

BATCH_SIZE, RATE = 32, 0.003
# Of each, its weight and its title.
METHODS = {
    "softmax": (0.0, "softmax loss"),
    "paper": (PAPER_WEIGHT, f"softmax + {PAPER_WEIGHT} x separate loss, paper's form"),
    "square": (WEIGHT, f'softmax + {WEIGHT:g} x separate loss, `scale_free`, `"square"`'),
}
COLUMNS = {
    "accuracy": ("accuracy, %", 2),
    "intra": ("intra-class similarity", 3),
    "inter": ("inter-class similarity", 3),
    "closest": ("two closest classes", 3),
    "agreement": ("center agreement", 3),
}


class Trained(NamedTuple):
    """Of the unseen digits, and of the centers if there are any."""

    figures: Figures
    features: Tensor
    labels: Tensor
    centers: Tensor | None


def setting(method: str, seed: int, epochs: int) -> Setting:
    """Signed features, half of the digits."""
    weight = METHODS[method][0]
    return Setting("digits", "signed", method, weight, RATE, seed, epochs, BATCH_SIZE)


def trained(training: Training) -> Trained:
    """What is shown of a training, as it is now."""
    unseen = training.sides.measured
    features, _ = outputs(training.model, unseen.images)
    return Trained(figures(training, unseen), features, unseen.labels, training.centers)


def run(method: str, seed: int, epochs: int) -> Trained:
    """Trains one model; all methods start from the same weights and see the same batches."""
    training, title = start(setting(method, seed, epochs)), METHODS[method][1]
    for epoch in training.epochs:
        print(f"\rseed {seed}, {title}: epoch {epoch + 1}/{epochs}", end="", flush=True)
    found = trained(training)
    print(f", accuracy {found.figures['accuracy']:.2f} %", flush=True)
    return found


def rows(results: dict[str, list[Figures]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = [
        [
            METHODS[method][1],
            *(
                show_spread([one[name] for one in runs], digits)
                for name, (_, digits) in COLUMNS.items()
            ),
        ]
        for method, runs in results.items()
    ]
    return table(["loss", *(title for title, _ in COLUMNS.values())], lines)


def in_the_plane(*parts: Tensor) -> list[Tensor]:
    """One t-SNE of all parts by their directions, which are what the loss sees."""
    rows = F.normalize(torch.cat([part.double() for part in parts]), dim=-1)
    perplexity = min(30, len(rows) // 4)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows.numpy())
    return list(torch.from_numpy(plane).split([len(part) for part in parts]))


def picture(trained: dict[str, Trained], path: Path) -> None:
    """The feature spaces of all methods side by side, and how similar their class means are."""
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(5, 3))
    upper, lower = parts
    panels = upper.subplots(1, len(trained)), lower.subplots(1, len(trained))
    for axes, matrix, (method, result) in zip(*panels, trained.items(), strict=True):
        true_centers = metrics.class_centers(result.features, result.labels, 10)
        centers = [true_centers] if result.centers is None else [true_centers, result.centers]
        points, *marked = in_the_plane(result.features, *centers)
        plots.feature_space(
            points,
            result.labels,
            true_centers=marked[0],
            learned_centers=marked[1] if len(marked) > 1 else None,
            axes=axes,
        )
        found = result.figures
        axes.set_title(
            f"{METHODS[method][1].replace('`', '')}:\naccuracy {found['accuracy']:.1f} %, mean "
            f"cosine within classes {found['intra']:.2f}, between {found['inter']:.2f}",
            fontsize=10,
        )
        plots.center_similarity(true_centers, axes=matrix)
        matrix.set_title("cosines between class means", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


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
            found = run(method, seed, options.epochs)
            results[method].append(found.figures)
            first.setdefault(method, found)
    print(
        f"\nscikit-learn's digits, half of them unseen; mean ± deviation of {options.seeds} seeds"
    )
    print(rows(results))
    picture(first, options.output)
    print(f"\nPicture: {options.output} ({time.perf_counter() - began:.0f} s in all)")


if __name__ == "__main__":
    main()
