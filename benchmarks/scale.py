"""Time and peak memory of a step, over classes and over samples. About 6 minutes on two cores.

Each point has its own process. The textbook form stops where its matrices (C, C) fill the memory.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.harness import (
    Results,
    format_memory,
    format_time,
    make_parser,
    provenance,
    save_svg,
    table,
    write,
)
from benchmarks.steps import Size, measure_step

NUM_CLASSES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
NUM_SAMPLES = (64, 256, 1_024, 4_096, 16_384)
# What is fixed while classes or samples grow.
SAMPLES, CLASSES, FEATURE_DIM = 256, 10_000, 128
# The name of each form in `LOSSES`, and its color.
FORMS = {
    "simplex": ("SeparateLoss, simplex", "#6a3d9a"),
    "simplex, gradient": ("SeparateLoss, simplex, gradient", "#b79ad1"),
    "paper": ("SeparateLoss, paper", "#0b6e4f"),
    "paper, gradient": ("SeparateLoss, paper, gradient", "#3a7ca5"),
    "textbook": ("textbook", "#c1440e"),
}
FIXED = {"num_classes": f"{SAMPLES} samples", "num_samples": f"{CLASSES:,} classes"}

Points = Sequence[Mapping[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes all files."""
    parser = make_parser("scale", __doc__, timing=True)
    parser.add_argument("--classes", nargs="+", type=int, help="in place of the usual ones")
    parser.add_argument("--samples", nargs="+", type=int, help="in place of the usual ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {
        "classes": options.classes or (NUM_CLASSES[:5:2] if options.quick else NUM_CLASSES),
        "samples": options.samples or (NUM_SAMPLES[::2] if options.quick else NUM_SAMPLES),
        "seconds": 0.05 if options.quick else 0.5,
    }
    results = Results(options, "scale", settings, options.device)
    settings = results.settings
    where = (options.device, options.threads, settings["seconds"])
    sizes = {
        "num_classes": [Size(SAMPLES, FEATURE_DIM, number) for number in settings["classes"]],
        "num_samples": [Size(number, FEATURE_DIM, CLASSES) for number in settings["samples"]],
    }
    forms = list(FORMS)
    if results.redraw:  # those that were measured
        first = sizes["num_classes"][0]
        forms = [form for form in FORMS if f"{first} {form}" in results.measured]
    curves: dict[str, dict[str, list[Any]]] = {axis: {form: [] for form in forms} for axis in sizes}
    points = [(axis, *point) for axis in sizes for point in product(sizes[axis], forms)]
    for number, (axis, size, form) in enumerate(points, 1):
        point = results.once(f"{size} {form}", partial(_measure, form, size, *where))
        curves[axis][form].append(point)
        shown = point.get("skipped") or ", ".join(_cells(point))
        print(f"[{number}/{len(points)}] {size} {form}: {shown}", flush=True)

    parts = ["# How cost grows", provenance(results.environment)]
    for axis, curve in curves.items():
        parts += [f"## Over {axis.removeprefix('num_')}, {FIXED[axis]}", _table(axis, curve)]
    write(options.output / "scale.md", "\n\n".join(parts) + "\n")
    save_svg(_draw("num_classes", curves["num_classes"]), options.output / "cost.svg")
    print(f"\nWritten to {options.output}")


def _measure(form: str, size: Size, *where: Any) -> dict[str, Any]:
    """In a new process, where nothing was allocated before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return size._asdict() | pool.submit(measure_step, FORMS[form][0], size, *where).result()


def _table(axis: str, forms: Mapping[str, Points]) -> str:
    columns = product(forms, ("time", "/ floor", "peak memory"))
    header = [axis.replace("num_", ""), *(f"{form}, {name}" for form, name in columns)]
    rows = [
        [f"{points[0][axis]:,}", *(cell for point in points for cell in _cells(point))]
        for points in zip(*forms.values(), strict=True)
    ]
    return table(header, rows)


def _cells(point: Mapping[str, Any]) -> tuple[str, str, str]:
    if "skipped" in point:
        return "does not fit", "-", "-"
    ratio = f"{point['median'] / point['floor']:.2f}"
    return format_time(point["median"]), ratio, format_memory(point["peak"])


def _draw(axis: str, forms: Mapping[str, Points]) -> Figure:
    """Time and memory."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    units = {"median": ("milliseconds a step", 1e3), "peak": ("MiB beyond the inputs", 2**-20)}
    for axes, (key, (title, unit)) in zip(panels, units.items(), strict=True):
        for form, points in forms.items():
            name, color = FORMS[form]
            shown = [(point[axis], unit * point[key]) for point in points if point.get(key)]
            if shown:
                axes.loglog(*zip(*shown, strict=True), "o-", color=color, label=name)
        axes.set(xlabel=axis.removeprefix("num_"), title=title)
        axes.grid(alpha=0.3)
    measured = next(iter(forms.values()))
    numbers, floors = zip(*((one[axis], 1e3 * one["floor"]) for one in measured), strict=True)
    panels[0].loglog(numbers, floors, "--", color="black", label="the floor")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure
