"""Feature spaces with learned and true centers, as in the paper's Figure 3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.demo import in_the_plane
from benchmarks.quality.figures import plain
from benchmarks.quality.runs import Source, run
from benchmarks.quality.settings import KINDS, Setting
from benchmarks.quality.study import PICTURED, Study
from separate_loss import metrics, plots

SAMPLES = 600


def plane(setting: Setting, source: Source) -> dict[str, Any]:
    """One t-SNE of some test features, class means and learned centers, as JSON takes it."""
    trained = run(setting, source)[1]
    classes = int(trained.labels.max()) + 1
    means = metrics.class_centers(trained.features, trained.labels, classes)
    learned = means[:0] if trained.centers is None else trained.centers
    shown = slice(SAMPLES)
    placed = in_the_plane(trained.features[shown], means, learned)
    points, true_centers, learned_centers = (
        [[round(value, 1) for value in row] for row in part.tolist()] for part in placed
    )
    return {
        "points": points,
        "labels": trained.labels[shown].tolist(),
        "true_centers": true_centers,
        "learned_centers": learned_centers,
    }


def draw(study: Study, planes: Mapping[Setting, Mapping[str, Any]], folder: Path) -> None:
    """A picture for each data set and kind of features, methods side by side."""
    for data in study.data:
        for kind in KINDS:
            figure = Figure(figsize=(15, 5.4), layout="constrained", facecolor="white")
            for axes, row in zip(figure.subplots(1, len(PICTURED)), PICTURED, strict=True):
                setting = study.row_settings(data, kind, row)[0]
                shown = planes[setting]
                learned = torch.tensor(shown["learned_centers"])
                plots.feature_space(
                    torch.tensor(shown["points"]),
                    torch.tensor(shown["labels"]),
                    true_centers=torch.tensor(shown["true_centers"]),
                    learned_centers=learned if len(learned) else None,
                    class_names=study.class_names[data],
                    axes=axes,
                )
                found = study.found[setting]
                axes.set_title(
                    f"{plain(row.title)}\n{found['accuracy']:.1f} %, cosines within classes "
                    f"{found['intra']:.2f}, between {found['inter']:.2f}",
                    fontsize=10,
                )
            figure.savefig(folder / f"features-{data}-{kind}.png", dpi=110)
