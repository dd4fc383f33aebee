"""What a step costs on a CPU: forward, backward and moved centers.

`speed` compares losses, in about 12 minutes on two cores; `scale` shows how time and memory grow
with classes, in about 4. Each loss at each size has a process of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness, steps
from benchmarks.harness import Results, format_memory, format_time
from benchmarks.losses import FORMS, LOSSES, PAIRS
from benchmarks.steps import ONCE, Size

SIZES = [(32, 64, 7), (128, 512, 7), (256, 512, 1_000), (256, 512, 10_000), (512, 512, 100_000)]
GROWTH = [(256, 128, 1_000 * n) for n in (1, 3, 10, 30, 100, 300, 1_000)]
GROWING = [f"SeparateLoss, {form}{how}" for form in FORMS for how in ("", ", gradient")]
MOST_PAIRED = 30_000  # classes, whose matrices of all pairs take 7 GiB
IMAGES, BATCH_SIZE = 112, 32  # of the ResNet-18 step

Row = Mapping[str, float]
Found = Mapping[str, Mapping[Size, Row | None]]  # None where a loss was not measured

FIGURES: dict[str, Callable[[Row], str]] = {
    "time": lambda row: format_time(row["median"]),
    "time between quartiles": lambda row: format_time(row["iqr"]) if row["runs"] > 1 else "-",
    "peak memory beyond the inputs": lambda row: format_memory(row["peak"]) if row["peak"] else "-",
}


def speed(arguments: list[str] | None = None) -> None:
    """Measures all losses, and the share of the first in a ResNet-18 step; writes speed.md."""
    results, found = _measure_all("speed", [*LOSSES, ONCE], SIZES, arguments)
    loss, seconds = next(iter(found)), results.settings["seconds"]

    def measure_resnet() -> list[Row]:  # apart: the loss adds less than noise
        step = steps.prepare_training(["cross-entropy head"], IMAGES, BATCH_SIZE, autocast=False)
        alone = steps.prepare(loss, *steps.draw_batch(Size(BATCH_SIZE, 512, 7)), 7)
        return [steps.measure(one, seconds) for one in (step, alone)]

    step, alone = (one["median"] for one in results.once("ResNet-18", measure_resnet))
    text = (
        f"Forward, backward and SGD of ResNet-18 take {format_time(step)} on {BATCH_SIZE} images "
        f"of {IMAGES} x {IMAGES}. {loss}, for 7 classes, takes {format_time(alone)}, "
        f"{alone / step:.2%} of it."
    )
    _write("What a step costs", results, found, [*FIGURES][:2], text)


def scale(arguments: list[str] | None = None) -> None:
    """Measures some losses over classes; writes scale.md and cost.svg."""
    results, found = _measure_all("scale", [*GROWING, PAIRS, ONCE], GROWTH, arguments)
    _write("How cost grows", results, found, FIGURES)
    harness.save_svg(_draw(found), results.path.with_name("cost.svg"))


def _measure_all(
    command: str, losses: Iterable[str], sizes: Sequence[Any], arguments: list[str] | None
) -> tuple[Results, Found]:
    """Parses the command line, and measures what is not yet measured."""
    options = harness.make_parser(command, __doc__, timing=True).parse_args(arguments)
    settings: dict[str, Any] = {"losses": losses, "sizes": sizes, "seconds": 0.5}
    if options.quick:
        few = [name for name in losses if not name.endswith("compiled")]
        settings = {"losses": few, "sizes": sizes[:3], "seconds": 0.05}
    results = Results(options, command, settings, "cpu")
    names, sizes, seconds = results.settings.values()
    found: dict[str, dict[Size, Row | None]] = {name: {} for name in names}
    for size, name in product(map(Size._make, sizes), names):
        found[name][size] = results.once(f"{size} {name}", partial(_measure, seconds, size, name))
    return results, found


def _measure(seconds: float, size: Size, name: str) -> Row | None:
    """In a new process, where nothing was allocated before; None for too many pairs of classes."""
    print(size, name, flush=True)
    if name == PAIRS and size.num_classes > MOST_PAIRED:
        return None
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.steps"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(steps.measure_step, size, name, seconds).result()


def _write(title: str, results: Results, found: Found, figures: Iterable[str], *end: str) -> None:
    """A page with a table for each of some `FIGURES`."""
    sizes = "Sizes are (samples, features, classes)."
    parts = [f"# {title}", harness.provenance(results.environment), sizes]
    for figure in figures:
        lines = [
            [name, *(FIGURES[figure](one) if one else "-" for one in rows.values())]
            for name, rows in found.items()
        ]
        parts.append(harness.table([figure, *map(str, found[ONCE])], lines))
    path = results.path.with_suffix(".md")
    harness.write(path, "\n\n".join([*parts, *end]) + "\n")
    print(f"\nWritten to {path.parent}")


def _draw(found: Found) -> Figure:
    """Time and memory over classes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    units = {"median": ("milliseconds a step", 1e3), "peak": ("MiB beyond the inputs", 2**-20)}
    for axes, (key, (title, unit)) in zip(panels, units.items(), strict=True):
        for name, rows in found.items():
            shown = {size: unit * row[key] for size, row in rows.items() if row and row[key]}
            classes, style = [size.num_classes for size in shown], "k--" if name == ONCE else "o-"
            axes.loglog(classes, [*shown.values()], style, label=name)
        axes.set(xlabel="classes", title=title)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
