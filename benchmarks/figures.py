"""Plots of speed and scale. All our pictures are on white, and so legible in dark pages as well."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from benchmarks import report
from benchmarks.contenders import Contender, Size

__all__ = ["cost", "scale", "speed"]

ROLES = {
    "ours": ("#0b6e4f", "this library"),
    "textbook": ("#c1440e", "the equations as they stand"),
    "rival": ("#5a7d9a", "centers, proxies or triplets"),
    "head": ("#9a9a9a", "in the classifier's place"),
}
FORMS = {
    "paper": "#0b6e4f",
    "gradient": "#3a7ca5",
    "gradient, no step": "#8ab6d6",
    "textbook": "#c1440e",
}
NAMES = {
    "paper": "SeparateLoss, paper's update",
    "gradient": 'SeparateLoss, center_update="gradient", with SGD',
    "gradient, no step": "the same, up to the centers' gradient",
    "textbook": "the sum over pairs, as it stands in the paper",
}


def speed(
    measured: Mapping[str, Any], sizes: Sequence[Size], chosen: Sequence[Contender], path: Path
) -> None:
    """Bars for each size, the floor as a line."""
    height = 0.8 + 0.16 * len(chosen)
    figure = Figure(figsize=(9, height * len(sizes)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    for axes, size in zip(panels, sizes, strict=True):
        found = [measured[f"{size} {one.name}"] for one in chosen]
        times = [1e3 * one["median"] if "median" in one else math.nan for one in found]
        colors = [ROLES[one.role][0] for one in chosen]
        rows = range(len(chosen))
        axes.barh(rows, times, color=colors)
        floor = 1e3 * median(one["floor"] for one in found if "floor" in one)
        axes.axvline(floor, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=min([floor, *(time for time in times if time > 0)]) / 1.5)
        for row, milliseconds in zip(rows, times, strict=True):
            absent = math.isnan(milliseconds)
            digits = ",.0f" if milliseconds >= 1000 else ".3g"
            label = " does not fit in memory" if absent else f" {milliseconds:{digits}}"
            axes.text(floor if absent else milliseconds, row, label, va="center", fontsize=7)
        axes.set_yticks(rows, [one.name for one in chosen], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"(N, d, C) = {size}: milliseconds a step; dashed: the floor", fontsize=9)
    handles = [Patch(color=color, label=name) for color, name in ROLES.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path)


def scale(curves: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Time and memory, log-log, over classes and over samples; `curves[axis][form]` the points."""
    figure = Figure(figsize=(9, 7), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2)
    for column, (axis, forms) in zip(panels.T, curves.items(), strict=True):
        for form, points in forms.items():
            shown = [point for point in points if "median" in point]
            xs = [point[axis] for point in shown]
            times = [1e3 * point["median"] for point in shown]
            memory = [(point["peak"] or math.nan) / 2**20 for point in shown]
            for axes, ys in zip(column, (times, memory), strict=True):
                axes.loglog(xs, ys, "o-", markersize=4, color=FORMS[form], label=form)
        for axes, name in zip(column, ("milliseconds a step", "MiB beyond inputs"), strict=True):
            axes.set(xlabel=axis.replace("_", " ").removeprefix("num "), ylabel=name)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=9)
    _save(figure, path)


def cost(forms: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Time and memory over classes alone, and the floor of time where it was measured."""
    figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for axes, (key, unit) in zip(panels, (("median", 1e3), ("peak", 2**-20)), strict=True):
        for form, points in forms.items():
            shown = [point for point in points if point.get(key)]
            ys = [unit * point[key] for point in shown]
            xs = [point["num_classes"] for point in shown]
            axes.loglog(xs, ys, "o-", color=FORMS[form], label=NAMES[form])
        axes.set_xlabel("classes")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    points = [point for point in next(iter(forms.values())) if "floor" in point]
    floors = [1e3 * point["floor"] for point in points]
    if floors:
        classes = [point["num_classes"] for point in points]
        name = "the floor: centers read once, written once"
        panels[0].loglog(classes, floors, "--", color="black", label=name)
    panels[0].set_title("milliseconds a step", fontsize=11)
    panels[1].set_title("MiB beyond features, target and centers", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As SVG that does not differ where the figures do not."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "separate-loss"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    report.write(path, text.getvalue())
