"""What does a step cost? Forward, backward and centers moved, beside other losses and the floor.

The floor is what any implementation must do that returns a gradient for the centers, or new ones:
read them once, then allocate a tensor of their size and write it. It is measured anew right before
each loss. About 12 minutes on two cores; --quick takes less than one.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch

from benchmarks import contenders, figures, report
from benchmarks.contenders import CONTENDERS, Contender, Problem, Size
from benchmarks.timing import measure, warn_of_load

__all__ = ["main"]

SIZES = (
    Size(32, 64, 7),
    Size(128, 512, 7),
    Size(256, 512, 1_000),
    Size(256, 512, 10_000),
    Size(512, 512, 100_000),
)
# Forms of ours that the bars are held against: those that carry the loss alone.
HELD = (
    "SeparateLoss, paper",
    "SeparateLoss, gradient",
    "SeparateLoss, gradient, no step",
    "functional",
)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes all three files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed", description=__doc__)
    report.add_options(parser)
    parser.add_argument(
        "--quick", action="store_true", help="the three small sizes, briefly, nothing compiled"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=_size, metavar="N,d,C", help="in place of the usual ones"
    )
    parser.add_argument("--images", type=int, default=112, help="pixels, for the ResNet-18 step")
    options = parser.parse_args(arguments)
    sizes = options.sizes or (SIZES[:3] if options.quick else SIZES)
    seconds = 0.04 if options.quick else 0.5
    torch.set_num_threads(options.threads)
    if not options.redraw:
        warn_of_load()
    results = report.Results(
        report.output(options, "speed", ".json"),
        {"sizes": [list(size) for size in sizes], "seconds": seconds, "images": options.images},
        device=options.device,
        fresh=options.fresh,
        redraw=options.redraw,
    )

    chosen = [one for one in CONTENDERS if not (options.quick and one.compiled)]
    for number, (size, contender) in enumerate(product(sizes, chosen), 1):
        found = results.once(
            f"{size} {contender.name}",
            partial(_measure, contender, size, options.device, options.threads, seconds),
        )
        said = (
            found.get("skipped")
            or f"{report.duration(found['median'])}, {_over_floor(found)} x the floor"
        )
        report.progress(number, len(sizes) * len(chosen), f"{size} {contender.name}: {said}")
    whole = results.once(
        "ResNet-18",
        lambda: _share(options.images, options.device, options.threads, seconds),
    )
    report.progress(1, 1, f"ResNet-18 step: {report.duration(median(whole['without']))}")

    text = _page(results, sizes, chosen, options)
    report.write(report.output(options, "speed", ".md"), text)
    figures.speed(results.measured, sizes, chosen, report.output(options, "speed", ".svg"))
    print(text)


def _size(text: str) -> Size:
    return Size(*map(int, text.split(",")))


def _measure(
    contender: Contender, size: Size, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    needs, has = contender.needs(size), contenders.available(device)
    if needs > 0.8 * has:
        return {
            "skipped": f"not attempted: {needs / 2**30:,.0f} GiB for pairs of classes, "
            f"{has / 2**30:,.0f} GiB free"
        }
    bound = measure(contenders.floor(size, device), threads=threads, seconds=seconds / 2)
    began = time.perf_counter()
    step = contender.step(Problem.draw(size, device))
    first = time.perf_counter() - began
    timing = measure(step, threads=threads, seconds=seconds)
    return {**timing, "floor": bound["median"], "first": first}


def _share(images: int, device: str, threads: int, seconds: float) -> dict[str, Any]:
    from benchmarks import resnet  # noqa: PLC0415 - slow to import

    return resnet.share(
        images=images, batch_size=32, device=device, threads=threads, seconds=seconds
    )


def _page(
    results: report.Results,
    sizes: Sequence[Size],
    chosen: Sequence[Contender],
    options: argparse.Namespace,
) -> str:
    parts = ["# What a step costs", report.provenance(results.environment)]
    parts += ["## Bars", _bars(results.measured, sizes, options.device)]
    for size in sizes:
        timed = {one.name: results.measured[f"{size} {one.name}"] for one in chosen}
        parts += [f"## (N, d, C) = {size}", _times(timed), _ratios(timed, chosen)]
    parts += ["## A ResNet-18 step", _whole(results.measured["ResNet-18"])]
    return "\n\n".join(parts) + "\n"


def _times(timed: dict[str, Any]) -> str:
    """Time, spread and ratio to the floor of each."""
    floors = [found["floor"] for found in timed.values() if "floor" in found]
    rows = [["*the floor*", report.duration(median(floors)), _spread(floors), len(floors), "1"]]
    for name, found in timed.items():
        if "skipped" in found:
            rows.append([f"{name}: {found['skipped']}", *"----"])
        else:
            spread = report.duration(found["iqr"]) if found["runs"] > 1 else "-"
            taken = report.duration(found["median"])
            rows.append([name, taken, spread, found["runs"], _over_floor(found)])
    return report.table(["", "median", "between quartiles", "runs", "/ floor"], rows)


def _ratios(timed: dict[str, Any], chosen: Sequence[Contender]) -> str:
    """Our time over the time of each of the others: below 1 we are faster."""
    ours = [one.name for one in chosen if one.role == "ours"]
    rows = []
    for one in chosen:
        if one.role != "ours" and "median" in timed[one.name]:
            other = timed[one.name]["median"]
            rows.append([one.name, *(_number(timed[name]["median"] / other) for name in ours)])
    return "Our time / theirs:\n\n" + report.table(["", *ours], rows)


def _whole(found: dict[str, Any]) -> str:
    without, both, alone = found["without"], found["with"], found["alone"]
    rows = [
        ["step without the loss", report.duration(median(without)), _spread(without)],
        ["step with it", report.duration(median(both)), _spread(both)],
        ["the loss alone", report.duration(alone["median"]), report.duration(alone["iqr"])],
    ]
    added = [after / before - 1 for before, after in zip(without, both, strict=True)]
    images = found["images"]
    return (
        f"{found['batch_size']} images of {images} x {images}, forward, backward and SGD, 7 "
        f"classes; SeparateLoss, paper. Both steps in {len(added)} turns.\n\n"
        + report.table(["", "median", "between quartiles"], rows)
        + f"\n\nThe loss alone takes {alone['median'] / median(without):.2%} of the step. The step "
        f"with it takes {median(added):+.2%}, in single turns from {min(added):+.2%} to "
        f"{max(added):+.2%}."
    )


def _bars(measured: dict[str, Any], sizes: Sequence[Size], device: str) -> str:
    """The bars that this run has the figures for, each of ours against its limit."""
    rows: list[list[str]] = []

    def hold(what: str, limit: float, ratios: list[float], *, shown: str) -> None:
        cells = [f"{format(ratio, shown)}, {report.verdict(ratio <= limit)}" for ratio in ratios]
        rows.append([what, f"{limit:{shown}}", *cells, *["-"] * (len(HELD) - len(cells))])

    def ratios(size: Size, other: float) -> list[float]:
        return [measured[f"{size} {name}"]["median"] / other for name in HELD]

    small = SIZES[1]
    if small in sizes:
        rivals = {
            one.name: found["median"]
            for one in CONTENDERS
            if one.role == "rival"
            for found in [measured[f"{small} {one.name}"]]
            if "median" in found
        }
        name = min(rivals, key=rivals.__getitem__)
        what = f"{small}: / fastest with centers or mined triplets ({name})"
        hold(what, 1, ratios(small, rivals[name]), shown=".2f")
    for size in sizes:
        if size == SIZES[3]:
            head = measured[f"{size} cross-entropy head"]["median"]
            hold(f"{size}: / cross-entropy head", 1 / 8, ratios(size, head), shown=".3f")
        if size in SIZES[3:] and device == "cpu":
            over = [found["median"] / found["floor"] for found in _held(measured, size)]
            hold(f"{size}: / floor", 2.5, over, shown=".2f")
    whole = measured["ResNet-18"]
    part = whole["alone"]["median"] / median(whole["without"])
    hold("ResNet-18: loss alone / step", 0.01, [part], shown=".2%")
    return report.table(["", "at most", *HELD], rows)


def _held(measured: dict[str, Any], size: Size) -> list[dict[str, float]]:
    return [measured[f"{size} {name}"] for name in HELD]


def _over_floor(found: dict[str, Any]) -> str:
    return _number(found["median"] / found["floor"])


def _number(ratio: float) -> str:
    """Three digits that count."""
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _spread(times: Sequence[float]) -> str:
    ordered = torch.tensor(sorted(times), dtype=torch.float64)
    low, high = ordered.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return report.duration(high - low)
