"""What does a step cost? Forward, backward and moved centers, beside other losses and the floor.

The floor is what any implementation must do that returns a gradient for the centers, or new ones:
read them once, then write a new tensor of their size. About 12 minutes; --quick takes one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from statistics import median, quantiles
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Results, format_time, make_parser, provenance, table, write
from benchmarks.losses import LOSSES
from benchmarks.networks import backbone_classifier
from benchmarks.steps import Size, draw_batch, measure, measure_step, prepare

SIZES = ((32, 64, 7), (128, 512, 7), (256, 512, 1_000), (256, 512, 10_000), (512, 512, 100_000))
NUM_CLASSES, BATCH_SIZE, REPEATS = 7, 32, 5  # of the ResNet-18 step


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
    results = Results(options, "speed", settings, options.device)
    where = (options.device, options.threads, settings["seconds"])
    sizes = [Size(*size) for size in results.settings["sizes"]]
    losses = [name for name, loss in LOSSES.items() if not (options.quick and loss.compiled)]
    if results.redraw:  # those that were measured
        losses = [name for name in LOSSES if f"{sizes[0]} {name}" in results.measured]
    for number, (size, loss) in enumerate(product(sizes, losses), 1):
        found = results.once(f"{size} {loss}", partial(measure_step, loss, size, *where))
        shown = found.get("skipped") or format_time(found["median"])
        print(f"[{number}/{len(sizes) * len(losses)}] {size} {loss}: {shown}", flush=True)
    results.once("ResNet-18", partial(measure_resnet, losses[0], options.images, *where))

    parts = ["# What a step costs", provenance(results.environment)]
    for size in sizes:
        times = _times({loss: results.measured[f"{size} {loss}"] for loss in losses})
        parts += [f"## (N, d, C) = {size}", times]
    parts += ["## A ResNet-18 step", _resnet(losses[0], results.measured["ResNet-18"])]
    write(options.output / "speed.md", "\n\n".join(parts) + "\n")
    print(f"\nWritten to {options.output}")


def measure_resnet(
    loss: str, images: int, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Times of a training step of ResNet-18, and of the loss alone, which adds less than noise."""
    model = backbone_classifier("resnet18", "none", NUM_CLASSES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(BATCH_SIZE, 3, images, images, device=device)
    features, target = draw_batch(Size(BATCH_SIZE, model.feature_dim, NUM_CLASSES), device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch)[1], target).backward()
        optimizer.step()

    without = [measure(step, threads, seconds)["median"] for _ in range(REPEATS)]
    alone = measure(prepare(loss, features, target, NUM_CLASSES), threads, seconds)
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
