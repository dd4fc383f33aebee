"""Trains a digit classifier with and without the separate loss: prints a table, draws a picture.

python -m examples.digits
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data import Split, all_digits, stratified
from benchmarks.harness import format_spread, table
from benchmarks.networks import digit_classifier
from benchmarks.training import METHODS, evaluate, learned_centers, train_steps
from separate_loss import metrics

# The name in `METHODS` of each row, and the weight of the separate loss.
ROWS = {
    "softmax loss": ("softmax", 0.0),
    "softmax + 0.9 x separate loss, paper's form": ("paper", 0.9),
    "softmax + 1 x separate loss, simplex form": ("simplex", 1.0),
}
HEADER = ["loss", "accuracy, %", "intra-class similarity", "inter-class similarity"]
HEADER += ["two closest classes", "center agreement"]
FIGURES = ("accuracy", "intra", "inter", "closest", "agreement")  # of `evaluate`
EPOCHS = (0, 1, 3, 30)  # that the picture shows; the last is that of the table
# Digits that softmax loss leaves close, with their colors in the picture.
CLOSE, COLORS = (2, 3, 8), ("#1f77b4", "#d95f02", "#1b9e77")
ALL = tuple(range(10))


class Epoch(NamedTuple):
    """A model on the unseen digits, after an epoch."""

    figures: list[Any]  # in the order of `FIGURES`
    features: Tensor
    labels: Tensor
    centers: list[Tensor]  # class means, and learned centers if there are any


def train(title: str, seed: int, epochs: int, digits: Sequence[int] = ALL) -> Iterator[Epoch]:
    """Trains a row; all rows start from the same weights and see the same batches."""
    data = all_digits()
    chosen = torch.isin(data.labels, torch.tensor(digits))
    classes, labels = len(digits), torch.searchsorted(torch.tensor(digits), data.labels[chosen])
    seen, unseen = stratified(Split(data.images[chosen], labels), 0.5, seed)
    torch.manual_seed(seed)
    model = digit_classifier("signed", classes)
    name, weight = ROWS[title]
    method = METHODS[name]
    criterion = method.build(torch.ones(classes), model.feature_dim, weight)
    objective = method.objective(criterion, weight)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = epochs * len(seen.labels.split(32))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def measured() -> Epoch:
        features, logits = model(unseen.images)
        centers = [metrics.class_centers(features, unseen.labels, classes)]
        learned = learned_centers(criterion)
        if learned is not None and learned.any():  # zero before training
            centers.append(learned.clone())
        found = evaluate(features, logits, unseen.labels, *centers[1:])
        return Epoch([found[name] for name in FIGURES], features, unseen.labels, centers)

    yield measured()
    for _ in range(epochs):
        order = torch.randperm(len(seen.labels), generator=generator).split(32)
        batches = ((seen.images[rows], seen.labels[rows]) for rows in order)
        for _ in train_steps(model, batches, objective, [optimizer]):
            schedule.step()
        yield measured()


def draw(path: Path) -> None:
    """Draws directions of features, class means (o) and learned centers (X) in a unit circle."""
    figure = Figure(figsize=(2.2 * len(EPOCHS), 5.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(EPOCHS))
    for line, title in zip(panels, (*ROWS,)[::2], strict=True):
        run = list(train(title, 0, EPOCHS[-1], CLOSE))
        means = F.normalize(run[-1].centers[0].double(), dim=1)
        sides = (means - means.mean(0))[:2].T  # of the plane through the class means
        plane = torch.linalg.qr(sides)[0]
        plane = (plane * (plane * sides).sum(0).sign()).flip(1)  # the first class points up
        line[0].set_ylabel(title.split(",")[0], fontsize=11)
        for axes, number in zip(line, EPOCHS, strict=True):
            figures, features, labels, centers = run[number]
            axes.add_patch(Circle((0, 0), 1, facecolor="#f4f4f4", edgecolor="#bbbbbb"))
            drawn = [(F.normalize(rows.double(), dim=1) @ plane).T for rows in (features, *centers)]
            colors = [COLORS[label] for label in labels]
            axes.scatter(*drawn[0], s=12, color=colors, alpha=0.5, linewidths=0)
            for points, marker, color in zip(drawn[1:], "oX", ("white", "black"), strict=False):
                axes.scatter(*points, marker=marker, s=60, color=color, edgecolor="black")
            axes.set(xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
            axes.set_title(f"epoch {number}" if number else "before training", fontsize=12)
            axes.set_xlabel(f"within {figures[1]:.2f}, between {figures[2]:.2f}")
            axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains all rows under each seed, prints the table and draws."""
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row")
    parser.add_argument("--output", type=Path, default=Path("build/demo.png"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads would wait for one another on so small a model
    rows = []
    for title in ROWS:
        runs = [[*train(title, seed, EPOCHS[-1])][-1].figures for seed in range(options.seeds)]
        rows.append([title, *(format_spread(values, 3) for values in zip(*runs, strict=True))])
    print(f"scikit-learn's digits, half of them unseen; mean ± deviation of {options.seeds} seeds")
    print(table(HEADER, rows))
    draw(options.output)
    print(f"\nPicture: {options.output}")


if __name__ == "__main__":
    main()
