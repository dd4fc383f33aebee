"""What does a step cost? Forward, backward and moved centers, beside other losses and the floor.

The floor is what any implementation must do that returns a gradient for the centers, or new ones:
read them once, then write a new tensor of their size. About 12 minutes; --quick takes one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.harness import Results, format_time, make_parser, provenance, table, write
from benchmarks.losses import LOSSES
from benchmarks.steps import Size, draw_batch, measure, measure_step, prepare, prepare_training

SIZES = ((32, 64, 7), (128, 512, 7), (256, 512, 1_000), (256, 512, 10_000), (512, 512, 100_000))
BATCH_SIZE, REPEATS = 32, 5  # of the ResNet-18 step


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes both files."""
    parser = make_parser("speed", __doc__, timing=True)
    parser.add_argument("--sizes", nargs="+", metavar="N,d,C", help="in place of the usual ones")
    parser.add_argument("--images", type=int, default=112, help="pixels, for the ResNet-18 step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    given = [[int(number) for number in size.split(",")] for size in options.sizes or ()]
    settings = {
        "sizes": given or (SIZES[:3] if options.quick else SIZES),
        "seconds": 0.04 if options.quick else 0.5,
        "images": options.images,
    }
    results = Results(options, "speed", settings, "cpu")
    seconds, sizes = settings["seconds"], [Size(*size) for size in results.settings["sizes"]]
    losses = [name for name, loss in LOSSES.items() if not (options.quick and loss.compiled)]
    found = results.each(sizes, losses, partial(measure_step, seconds=seconds))
    ours = next(iter(found[sizes[0]]))
    resnet = results.once("ResNet-18", partial(measure_resnet, ours, options.images, seconds))

    parts = ["# What a step costs", provenance(results.environment)]
    parts += [f"## (N, d, C) = {size}\n\n{_times(times)}" for size, times in found.items()]
    parts += ["## A ResNet-18 step", _resnet(ours, resnet)]
    write(options.output / "speed.md", "\n\n".join(parts) + "\n")
    print(f"\nWritten to {options.output}")


def measure_resnet(loss: str, images: int, seconds: float) -> dict[str, Any]:
    """Times of a training step of ResNet-18, and of the loss alone, which adds less than noise."""
    step = prepare_training(["cross-entropy head"], images, BATCH_SIZE, autocast=False)
    without = [measure(step, seconds)["median"] for _ in range(REPEATS)]
    alone = measure(prepare(loss, *draw_batch(Size(BATCH_SIZE, 512, 7)), 7), seconds)
    return {"images": images, "batch_size": BATCH_SIZE, "without": without, "alone": alone}


def _times(found: Mapping[str, Any]) -> str:
    """Time, spread, and the ratios to the floor and to the first loss."""
    floors = [one["floor"] for one in found.values() if "floor" in one]
    reference = next(iter(found))
    ours, floor = found[reference]["median"], median(floors)
    ratios = "1", _ratio(floor, ours)
    rows = [["*the floor*", format_time(floor), _spread(floors), len(floors), *ratios]]
    for name, one in found.items():
        if "skipped" in one:
            rows.append([f"{name}: {one['skipped']}", *"-----"])
        else:
            spread = format_time(one["iqr"]) if one["runs"] > 1 else "-"
            ratios = _ratio(one["median"], one["floor"]), _ratio(one["median"], ours)
            rows.append([name, format_time(one["median"]), spread, one["runs"], *ratios])
    header = ["", "median", "between quartiles", "runs", "/ floor", f"/ {reference}"]
    return table(header, rows)


def _resnet(loss: str, found: Mapping[str, Any]) -> str:
    """The share of the loss in a training step."""
    without, alone, images = median(found["without"]), found["alone"]["median"], found["images"]
    return (
        f"Forward, backward and SGD on {found['batch_size']} images of {images} x {images}, 7 "
        f"classes: {format_time(without)}, between quartiles {_spread(found['without'])}. "
        f"{loss}, alone: {format_time(alone)}, {alone / without:.2%} of it."
    )


def _ratio(first: float, second: float) -> str:
    ratio = first / second
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _spread(times: Sequence[float]) -> str:
    low, _, high = quantiles(times, method="inclusive")
    return format_time(high - low)
