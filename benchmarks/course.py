"""Classes coming together and apart over training, step by step: `python -m benchmarks course`.

The demo's network on three digits, with and without the separate loss, on the same batches from the
same weights. Three directions that are as far apart as can be lie in a plane, so that a plane shows
what the loss does: the one through the class means after training, of each loss.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from torch import Tensor
from torch.nn import functional as F

from benchmarks import demo
from benchmarks.demo import Trained, trained
from benchmarks.digits import load_split
from benchmarks.quality.data import Sides
from benchmarks.quality.methods import WEIGHT
from benchmarks.quality.runs import start
from benchmarks.samples import Split
from separate_loss import metrics

__all__ = ["main"]

EPOCHS = (0, 1, 3, 30)
# Three that softmax loss leaves close.
DIGITS = (2, 3, 8)
METHODS = {"softmax": "softmax loss", "square": f"softmax + {WEIGHT:g} x separate"}
COLORS = ("#1f77b4", "#d95f02", "#1b9e77")


class Step(NamedTuple):
    """Directions after an epoch, each (rows, d) or in the plane (rows, 2)."""

    features: Tensor
    true_centers: Tensor
    learned_centers: Tensor  # no rows where there are none


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains both models and draws the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks course", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="that are shown")
    parser.add_argument("--output", type=Path, default=Path("build/course.png"))
    options = parser.parse_args(arguments)
    epochs = sorted(set(options.epochs))
    if epochs[0] < 0:
        parser.error("--epochs must be at least 0")
    torch.set_num_threads(1)
    _draw({method: _follow(method, epochs) for method in METHODS}, epochs, options.output)
    print(f"Picture: {options.output}")


def _chosen(data: Split) -> Split:
    """The three digits, as classes 0 to 2."""
    places = data.labels.unsqueeze(1) == torch.tensor(DIGITS)
    kept = places.any(1)
    return Split(data.images[kept], places[kept].int().argmax(1))


def _follow(method: str, epochs: list[int]) -> list[Trained]:
    """The model as it is after each of these epochs of one run."""
    sides = Sides(*(_chosen(part) for part in load_split(0)))
    training = start(demo.setting(method, 0, epochs[-1]), sides=sides)
    # Before training the centers are zero.
    found = [trained(training)._replace(centers=None)] if epochs[0] == 0 else []
    found += [trained(training) for epoch in training.epochs if epoch + 1 in epochs]
    return found


def _directions(trained: Trained) -> Step:
    means = metrics.class_centers(trained.features, trained.labels, len(DIGITS))
    learned = means[:0] if trained.centers is None else trained.centers
    rows = trained.features, means, learned
    return Step(*(F.normalize(part.double(), dim=-1) for part in rows))


def _plane(means: Tensor) -> Tensor:
    """An orthonormal basis (d, 2) along which three means differ; the first of them points up."""
    up, across = (means - means.mean(0))[:2]
    up = F.normalize(up, dim=0)
    across = F.normalize(across - (across @ up) * up, dim=0)
    return torch.stack([across, up], dim=1)


def _draw(runs: dict[str, list[Trained]], epochs: list[int], path: Path) -> None:
    columns = len(epochs)
    figure = Figure(figsize=(2.2 * columns, 6), layout="constrained", facecolor="white")
    panels = figure.subplots(len(runs), columns, squeeze=False)
    for line, (method, run) in zip(panels, runs.items(), strict=True):
        line[0].set_ylabel(METHODS[method].replace(" x ", " x\n"), fontsize=12)
        steps = [_directions(one) for one in run]
        plane = _plane(steps[-1].true_centers)
        for axes, step, one, epoch in zip(line, steps, run, epochs, strict=True):
            _panel(axes, Step(*(part @ plane for part in step)), one.labels)
            axes.set_title(f"epoch {epoch}" if epoch else "before training", fontsize=12)
            found = one.figures
            axes.set_xlabel(
                f"within {found['intra']:.2f}\nbetween {found['inter']:.2f}", fontsize=11
            )
    handles = [
        *(
            Line2D([], [], linestyle="", marker="o", color=color, label=f"a {digit}")
            for digit, color in zip(DIGITS, COLORS, strict=True)
        ),
        Line2D([], [], linestyle="", marker="o", color="black", mfc="white", label="class mean"),
        Line2D([], [], linestyle="", marker="X", color="black", label="learned center"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=5,
        fontsize=11,
        columnspacing=1,
        handletextpad=0.2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=180)


def _panel(axes: Axes, step: Step, labels: Tensor) -> None:
    """One epoch in the circle that all directions fall into."""
    axes.add_patch(Circle((0, 0), 1, facecolor="#f4f4f4", edgecolor="#bbbbbb"))
    dots = [COLORS[label] for label in labels.tolist()]
    _scatter(axes, step.features, s=12, color=dots, alpha=0.5, linewidths=0)
    _scatter(axes, step.true_centers, marker="o", s=75, color="white", edgecolor="black")
    _scatter(axes, step.learned_centers, marker="X", s=48, color="black", edgecolor="white")
    axes.set(xticks=[], yticks=[], xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes.spines[:].set_visible(False)


def _scatter(axes: Axes, points: Tensor, **style: object) -> None:
    x, y = points.unbind(1)
    axes.scatter(x.numpy(), y.numpy(), **style)  # type: ignore[arg-type]
