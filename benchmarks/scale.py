"""Time and peak memory of a step, over classes and over samples. About 6 minutes on two cores.

Each point has its own process. The textbook form stops where its matrices (C, C) fill the memory.
"""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import format_memory, format_time
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

Curves = Mapping[Size, Mapping[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes all files."""
    parser = harness.make_parser("scale", __doc__, timing=True)
    parser.add_argument("--classes", nargs="+", type=int, help="in place of the usual ones")
    parser.add_argument("--samples", nargs="+", type=int, help="in place of the usual ones")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = {
        "classes": options.classes or (NUM_CLASSES[:5:2] if options.quick else NUM_CLASSES),
        "samples": options.samples or (NUM_SAMPLES[::2] if options.quick else NUM_SAMPLES),
        "seconds": 0.05 if options.quick else 0.5,
    }
    results = harness.Results(options, "scale", settings, "cpu")
    settings = results.settings
    measure = partial(_measure, options.threads, settings["seconds"])
    of_classes, of_samples = (
        results.each(sizes, FORMS, measure)
        for sizes in (
            [Size(SAMPLES, FEATURE_DIM, number) for number in settings["classes"]],
            [Size(number, FEATURE_DIM, CLASSES) for number in settings["samples"]],
        )
    )
    parts = ["# How cost grows", harness.provenance(results.environment)]
    parts += [f"## Over classes, {SAMPLES} samples", _table("num_classes", of_classes)]
    parts += [f"## Over samples, {CLASSES:,} classes", _table("num_samples", of_samples)]
    harness.write(options.output / "scale.md", "\n\n".join(parts) + "\n")
    harness.save_svg(_draw(of_classes), options.output / "cost.svg")
    print(f"\nWritten to {options.output}")


def _measure(threads: int, seconds: float, size: Size, form: str) -> dict[str, Any]:
    """In a new process, where nothing was allocated before."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return size._asdict() | pool.submit(measure_step, size, FORMS[form][0], seconds).result()


def _table(axis: str, curves: Curves) -> str:
    columns = product(next(iter(curves.values())), ("time", "/ floor", "peak memory"))
    header = [axis.removeprefix("num_"), *(f"{form}, {name}" for form, name in columns)]
    rows = [
        [f"{getattr(size, axis):,}", *(cell for point in points.values() for cell in _cells(point))]
        for size, points in curves.items()
    ]
    return harness.table(header, rows)


def _cells(point: Mapping[str, Any]) -> tuple[str, str, str]:
    if "skipped" in point:
        return "does not fit", "-", "-"
    ratio = f"{point['median'] / point['floor']:.2f}"
    return format_time(point["median"]), ratio, format_memory(point["peak"])


def _draw(curves: Curves) -> Figure:
    """Time and memory over classes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    units = {"median": ("milliseconds a step", 1e3), "peak": ("MiB beyond the inputs", 2**-20)}
    points = [(size.num_classes, one) for size, one in curves.items()]
    for axes, (key, (title, unit)) in zip(panels, units.items(), strict=True):
        for form in points[0][1]:
            name, color = FORMS[form]
            shown = [(c, unit * one[form][key]) for c, one in points if one[form].get(key)]
            if shown:
                axes.loglog(*zip(*shown, strict=True), "o-", color=color, label=name)
        axes.set(xlabel="classes", title=title)
        axes.grid(alpha=0.3)
    floors = [(c, 1e3 * next(iter(one.values()))["floor"]) for c, one in points]
    panels[0].loglog(*zip(*floors, strict=True), "--", color="black", label="the floor")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure
