"""Plots of what was swept, and confusion matrices; on white, legible in dark pages as well."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.settings import KINDS, DataName
from benchmarks.quality.study import (
    DEFAULTS,
    ROWS,
    SIZE_METHODS,
    SOFTMAX,
    Record,
    Study,
)
from benchmarks.training import FeatureKind

COLORS = {"softmax": "#5a7d9a", "separate": "#0b6e4f"}
Panel = Callable[[Axes, FeatureKind], None]


def draw(study: Study, folder: Path) -> None:
    """All that there are runs for."""
    for data in study.data:
        _agreement(study, data, folder)
        _weights(study, data, folder)
        _confusion(study, data, folder)
    if "faces" in study.data:
        _sizes(study, folder)


def plain(title: str) -> str:
    """A table's title without Markdown."""
    return title.replace("`", "")


def _per_kind(panel: Panel, path: Path, *, legend: bool = True) -> None:
    """Both kinds of features side by side."""
    figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        panel(axes, kind)
        axes.set_title(f"{kind} features", fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)


def _agreement(study: Study, data: DataName, folder: Path) -> None:
    def panel(axes: Axes, kind: FeatureKind) -> None:
        for row in ROWS:
            courses = [found["course"] for found in study.row(data, kind, row)]
            if courses[0]["agreement"][0] is None:
                continue
            means = [fmean(each) for each in zip(*(c["agreement"] for c in courses), strict=True)]
            axes.plot(courses[0]["epoch"], means, "o-", markersize=3, label=plain(row.title))
        axes.axhline(0.8, color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="epoch", ylabel="cosine of learned to true centers", ylim=(-0.3, 1.05))

    _per_kind(panel, folder / f"agreement-{data}.png")


def _weights(study: Study, data: DataName, folder: Path) -> None:
    weights, seeds = study.scale.weights, study.scale.sweep_seeds[data]

    def panel(axes: Axes, kind: FeatureKind) -> None:
        runs = [study.records(data, kind, "separate", seeds, strength=one) for one in weights]
        _accuracies(axes, weights, runs, "separate", "softmax + weight x separate loss, defaults")
        softmax = study.records(data, kind, "softmax", seeds)
        of_all = _all("accuracy", study.row(data, kind, SOFTMAX))
        middle, spread = fmean(of_all), stdev(of_all)
        axes.axhspan(
            middle - spread,
            middle + spread,
            color=COLORS["softmax"],
            alpha=0.15,
            label=f"softmax loss, mean ± deviation of {len(of_all)} seeds",
        )
        axes.axhline(
            fmean(_all("accuracy", softmax)),
            color=COLORS["softmax"],
            linestyle="--",
            label=f"softmax loss, seeds of the line: {seeds}",
        )
        axes.set(xlabel="weight of the separate loss", ylabel="accuracy, %")

    _per_kind(panel, folder / f"weight-{data}.png")


def _sizes(study: Study, folder: Path) -> None:
    dims, seeds = study.scale.feature_dims, study.scale.sweep_seeds["faces"]

    def panel(axes: Axes, kind: FeatureKind) -> None:
        for method in SIZE_METHODS:
            runs = [study.records("faces", kind, method, seeds, feature_dim=dim) for dim in dims]
            _accuracies(axes, dims, runs, method, f"{method} loss")
        axes.set(xlabel="number of features", ylabel="accuracy, %", xscale="log")
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()

    _per_kind(panel, folder / "size-faces.png")


def _accuracies(
    axes: Axes, places: Sequence[float], runs: Sequence[Sequence[Record]], method: str, label: str
) -> None:
    """A line through the means, a dot for each run."""
    values = [_all("accuracy", found) for found in runs]
    axes.plot(places, [fmean(each) for each in values], color=COLORS[method], label=label)
    for place, each in zip(places, values, strict=True):
        axes.plot([place] * len(each), each, "o", markersize=4, color=COLORS[method])


def _all(name: str, found: Sequence[Record]) -> list[Any]:
    return [one[name] for one in found]


def _confusion(study: Study, data: DataName, folder: Path) -> None:
    names = study.class_names[data]
    figure = Figure(figsize=(11, 10.5), layout="constrained", facecolor="white")
    for line, kind in zip(figure.subplots(2, 2), KINDS, strict=True):
        for axes, row in zip(line, (SOFTMAX, DEFAULTS), strict=True):
            counts = np.sum([found["confusion"] for found in study.row(data, kind, row)], axis=0)
            shares = counts / counts.sum(1, keepdims=True).clip(1)
            axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
            for (true, predicted), share in np.ndenumerate(shares):
                color = "white" if share > 0.5 else "black"
                axes.text(
                    predicted,
                    true,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=color,
                )
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel="predicted", ylabel="true class")
            axes.set_title(f"{plain(row.title)}, {kind} features: % of the class", fontsize=10)
    figure.savefig(folder / f"confusion-{data}.png", dpi=110)
