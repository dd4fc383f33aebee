"""Trains a digit classifier with and without the separate loss: prints a table, draws a picture.

python -m examples.digits
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, metrics, plots

SQUARE = {"scale_free": True, "separation": "square"}
# Of each row: its title, the weight of the separate loss, and the options of its form.
ROWS: dict[str, tuple[float, dict[str, Any]]] = {
    "softmax loss": (0.0, {}),
    "softmax + 0.9 x separate loss, paper's form": (0.9, {}),
    'softmax + 1 x separate loss, `scale_free`, `"square"`': (1.0, SQUARE),
}
FIGURES = (
    *("accuracy, %", "intra-class similarity", "inter-class similarity"),
    *("two closest classes", "center agreement"),
)


class Trained(NamedTuple):
    """What a training gives on the unseen digits."""

    figures: list[float]  # in the order of `FIGURES`
    features: Tensor
    labels: Tensor
    centers: list[Tensor]  # class means, and learned centers if there are any


def train(title: str, seed: int, epochs: int) -> Trained:
    """Trains a row; all rows start from the same weights and see the same batches."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    seen, unseen = train_test_split(
        torch.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    torch.manual_seed(seed)
    body = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64)),
    )
    head = nn.Linear(64, 10)
    weight, options = ROWS[title]
    criterion = SeparateLoss(num_classes=10, feature_dim=64, **options)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], weight_decay=0.01)
    steps = epochs * len(seen.split(32))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in seen[torch.randperm(len(seen), generator=generator)].split(32):
            features = body(images[rows])
            loss = F.cross_entropy(head(features), labels[rows])
            if weight:
                loss = loss + weight * criterion(features, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        features, labels = body(images[unseen]), labels[unseen]
        accuracy = (head(features).argmax(1) == labels).double().mean()
        means = metrics.class_centers(features, labels, 10)
        cosines = F.cosine_similarity(means[:, None], means, dim=-1).fill_diagonal_(-1)
        figures = [
            100 * accuracy,
            metrics.intra_class_similarity(features, labels, means),
            metrics.inter_class_similarity(means),
            cosines.max(),
        ]
        centers = [means]
        if weight:
            centers.append(criterion.centers.detach())
            figures.append(metrics.center_agreement(*centers))
    return Trained([float(one) for one in figures], features, labels, centers)


def draw(runs: dict[str, Trained], path: Path) -> None:
    """Directions, which are what the loss sees, by t-SNE; below, cosines between class means."""
    figure = Figure(figsize=(15, 9.5), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(runs), height_ratios=(5, 3))
    for axes, matrix, (title, run) in zip(*panels, runs.items(), strict=True):
        parts = [run.features, *run.centers]
        rows = F.normalize(torch.cat(parts).double(), dim=1).numpy()
        plane = torch.from_numpy(TSNE(init="pca", random_state=0).fit_transform(rows))
        points, *centers = plane.split([len(part) for part in parts])
        names = ("true_centers", "learned_centers")
        plots.feature_space(
            points, run.labels, axes=axes, **dict(zip(names, centers, strict=False))
        )
        accuracy, within, between, *_ = run.figures
        axes.set_title(
            f"{title.replace('`', '')}:\naccuracy {accuracy:.1f} %, mean cosine\n"
            f"within classes {within:.2f}, between {between:.2f}",
            fontsize=10,
        )
        plots.center_similarity(run.centers[0], axes=matrix)
        matrix.set_title("cosines between class means", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains all rows under each seed, prints the table and draws."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    torch.set_num_threads(1)  # threads would wait for one another on so small a model
    print(f"scikit-learn's digits, half of them unseen; mean ± deviation of {options.seeds} seeds")
    print(f"| loss | {' | '.join(FIGURES)} |\n| ---{' | ---:' * len(FIGURES)} |", flush=True)
    first = {}
    for title in ROWS:
        runs = [train(title, seed, options.epochs) for seed in range(options.seeds)]
        first[title] = runs[0]
        figures = torch.tensor([run.figures for run in runs], dtype=torch.float64)
        means, deviations = figures.mean(0), figures.std(0, correction=min(1, len(runs) - 1))
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(means, deviations, strict=True)]
        cells += ["-"] * (len(FIGURES) - len(cells))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
    draw(first, options.output)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
