"""Trains a digit classifier with and without the separate loss: prints a table, draws a picture.

python -m examples.digits
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, metrics

# Of each row: its title, and the weight and the form of the separate loss.
ROWS: dict[str, tuple[float, Literal["simplex", "paper"]]] = {
    "softmax loss": (0.0, "simplex"),
    "softmax + 0.9 x separate loss, paper's form": (0.9, "paper"),
    "softmax + 1 x separate loss, simplex form": (1.0, "simplex"),
}
FIGURES = (
    *("accuracy, %", "intra-class similarity", "inter-class similarity"),
    *("two closest classes", "center agreement"),
)
# In the picture: epochs, and digits that softmax loss leaves close, with their colors.
EPOCHS, DIGITS, COLORS = (0, 1, 3), (2, 3, 8), ("#1f77b4", "#d95f02", "#1b9e77")


class Epoch(NamedTuple):
    """A model on the unseen digits, after an epoch."""

    figures: list[float]  # in the order of `FIGURES`
    features: Tensor
    labels: Tensor
    centers: list[Tensor]  # class means, and learned centers if there are any


def train(title: str, seed: int, epochs: int, digits: Sequence[int] = range(10)) -> Iterator[Epoch]:
    """Trains a row; all rows start from the same weights and see the same batches."""
    data: Any = load_digits()
    matches = torch.tensor(data.target).unsqueeze(1) == torch.tensor(list(digits))
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)[matches.any(1)]
    labels = matches[matches.any(1)].int().argmax(1)
    seen, unseen = train_test_split(
        torch.arange(len(labels)), test_size=0.5, random_state=seed, stratify=labels
    )
    torch.manual_seed(seed)
    body = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64)),
    )
    head = nn.Linear(64, len(digits))
    weight, form = ROWS[title]
    criterion = SeparateLoss(len(digits), feature_dim=64, form=form)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], weight_decay=0.01)
    steps = epochs * len(seen.split(32))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def evaluate() -> Epoch:
        features, target = body(images[unseen]), labels[unseen]
        means = metrics.class_centers(features, target, len(digits))
        cosines = F.cosine_similarity(means[:, None], means, dim=-1).fill_diagonal_(-1)
        figures = [
            100 * (head(features).argmax(1) == target).double().mean(),
            metrics.intra_class_similarity(features, target, means),
            metrics.inter_class_similarity(means),
            cosines.max(),
        ]
        centers = [means]
        if weight and criterion.centers.any():  # zero before training
            centers.append(criterion.centers.clone())
            figures.append(metrics.center_agreement(*centers))
        return Epoch([float(figure) for figure in figures], features, target, centers)

    yield evaluate()
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
        yield evaluate()


def draw(epochs: int, path: Path) -> None:
    """Draws directions of features in the plane through three class means after training."""
    numbers = sorted({*EPOCHS, epochs})
    figure = Figure(figsize=(2.2 * len(numbers), 5.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(numbers), squeeze=False)
    for line, title in zip(panels, (*ROWS,)[::2], strict=True):
        run = list(train(title, 0, epochs, DIGITS))
        means = F.normalize(run[-1].centers[0], dim=1)
        sides = (means - means.mean(0))[:2].T
        plane = torch.linalg.qr(sides)[0]
        plane = plane * (plane * sides).sum(0).sign()  # the first class points up
        line[0].set_ylabel(title.split(",")[0], fontsize=11)
        for axes, number in zip(line, numbers, strict=True):
            _panel(axes, run[number], plane)
            axes.set_title(f"epoch {number}" if number else "before training", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _panel(axes: Axes, epoch: Epoch, plane: Tensor) -> None:
    """One epoch, in the unit circle: features, class means (o) and learned centers (x)."""
    axes.add_patch(Circle((0, 0), 1, facecolor="#f4f4f4", edgecolor="#bbbbbb"))
    rows = [epoch.features, *epoch.centers]
    up, *_ = points = [(F.normalize(part.double(), dim=1) @ plane.double()).T for part in rows]
    colors = [COLORS[label] for label in epoch.labels.tolist()]
    axes.scatter(up[1], up[0], s=12, color=colors, alpha=0.5, linewidths=0)
    for (y, x), marker, color in zip(points[1:], "oX", ("white", "black"), strict=False):
        axes.scatter(x, y, marker=marker, s=60, color=color, edgecolor="black")
    axes.set(xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes.set_xlabel("within {1:.2f}, between {2:.2f}".format(*epoch.figures))
    axes.spines[:].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains all rows under each seed, prints the table and draws."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < max(EPOCHS):
        parser.error(f"--seeds must be at least 1, and --epochs at least {max(EPOCHS)}")
    torch.set_num_threads(1)  # threads would wait for one another on so small a model
    print(f"scikit-learn's digits, half of them unseen; mean ± deviation of {options.seeds} seeds")
    print(f"| loss | {' | '.join(FIGURES)} |\n| ---{' | ---:' * len(FIGURES)} |", flush=True)
    for title in ROWS:
        runs = [[*train(title, seed, options.epochs)][-1] for seed in range(options.seeds)]
        figures = torch.tensor([run.figures for run in runs], dtype=torch.float64)
        means, deviations = figures.mean(0), figures.std(0, correction=min(1, len(runs) - 1))
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(means, deviations, strict=True)]
        cells += ["-"] * (len(FIGURES) - len(cells))
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
    draw(options.epochs, options.output)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
