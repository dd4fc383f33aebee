"""How does cost grow? Time and peak memory of a step, over classes and over samples.

Each point is measured in a process of its own: the peak of the first step, then the time. The
textbook form goes as far as its matrices of all pairs fit in memory. About 6 minutes on two cores.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contenders, figures, report
from benchmarks.contenders import CONTENDERS, Contender, Problem, Size
from benchmarks.timing import measure, warn_of_load

__all__ = ["main"]

FEATURE_DIM = 128
NUM_CLASSES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
NUM_SAMPLES = (64, 256, 1_024, 4_096, 16_384)
# What is held fixed while the other grows.
SAMPLES, CLASSES = 256, 10_000
FORMS = {
    "paper": "SeparateLoss, paper",
    "gradient": "SeparateLoss, gradient",
    "gradient, no step": "SeparateLoss, gradient, no step",
    "textbook": "textbook",
}
FLOOR_AT = (100_000, 1_000_000)
# Below, what Python and torch cost whatever the size flattens the curve.
ASYMPTOTIC = {"num_classes": 30_000, "num_samples": 1_024}

Curves = dict[str, dict[str, list[dict[str, Any]]]]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes all files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    report.add_options(parser)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 classes, briefly")
    parser.add_argument("--classes", nargs="+", type=int, help="in place of the usual ones")
    parser.add_argument("--samples", nargs="+", type=int, help="in place of the usual ones")
    options = parser.parse_args(arguments)
    classes = options.classes or (NUM_CLASSES[:5:2] if options.quick else NUM_CLASSES)
    samples = options.samples or (NUM_SAMPLES[::2] if options.quick else NUM_SAMPLES)
    seconds = 0.05 if options.quick else 0.5
    torch.set_num_threads(options.threads)
    if not options.redraw:
        warn_of_load()
    results = report.Results(
        report.output(options, "scale", ".json"),
        {"classes": list(classes), "samples": list(samples), "seconds": seconds},
        device=options.device,
        fresh=options.fresh,
        redraw=options.redraw,
    )

    sizes = {
        "num_classes": [Size(SAMPLES, FEATURE_DIM, number) for number in classes],
        "num_samples": [Size(number, FEATURE_DIM, CLASSES) for number in samples],
    }
    curves: Curves = {axis: {form: [] for form in FORMS} for axis in sizes}
    total, number = len(FORMS) * (len(classes) + len(samples)), 0
    for axis, along in sizes.items():
        for form, size in ((form, size) for size in along for form in FORMS):
            number += 1
            point = results.once(
                f"{size} {form}",
                partial(_point, form, size, options.device, options.threads, seconds),
            )
            curves[axis][form].append(point)
            report.progress(number, total, f"{size} {form}: {_said(point)}")

    text = _page(results, curves)
    report.write(report.output(options, "scale", ".md"), text)
    figures.scale(curves, report.output(options, "scale", ".svg"))
    figures.cost(curves["num_classes"], report.output(options, "cost", ".svg"))
    print(text)


def _point(form: str, size: Size, device: str, threads: int, seconds: float) -> dict[str, Any]:
    place = {**size._asdict(), "free": contenders.available(device)}
    needs = _contender(form).needs(size)
    if needs > 0.8 * place["free"]:
        return {**place, "skipped": f"not attempted: pairs of classes need {_memory(needs)}"}
    job = json.dumps({"form": form, "device": device, "threads": threads, "seconds": seconds})
    # The parent's directory leads to the same package, the parent's Python to the same torch.
    command = [sys.executable, "-m", "benchmarks.scale", job, json.dumps(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {**place, **json.loads(done.stdout)}


def _contender(form: str) -> Contender:
    return next(one for one in CONTENDERS if one.name == FORMS[form])


def _in_a_process(form: str, size: Size, device: str, threads: int, seconds: float) -> None:
    """Prints peak and time of one point, and the floor below it, as JSON."""
    torch.set_num_threads(threads)
    contender = _contender(form)
    identity = contenders.as_it_is
    # Libraries and thread pools.
    warm = Size(8, size.feature_dim, 8)
    contender.build(Problem.draw(warm, device), identity)()
    step = contender.build(Problem.draw(size, device), identity)
    peak = _peak(step, device)
    timing = measure(step, threads=threads, seconds=seconds)
    bound = measure(contenders.floor(size, device), threads=threads, seconds=seconds / 2)
    print(json.dumps({**timing, "peak": peak, "floor": bound["median"]}))


def _peak(step: Any, device: str) -> int | None:
    """Bytes beyond what was there before the step; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        step()
        return None
    forget.write_text("5")
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def _resident(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) * 1024


def _page(results: report.Results, curves: Curves) -> str:
    parts = ["# How cost grows", report.provenance(results.environment), "## Bars", _bars(curves)]
    titles = {
        "num_classes": f"## Over classes, {SAMPLES} samples",
        "num_samples": f"## Over samples, {CLASSES:,} classes",
    }
    for axis, forms in curves.items():
        parts += [titles[axis], _table(axis, forms), *_slopes(axis, forms)]
    parts.append(_limit(curves["num_classes"]["textbook"]))
    return "\n\n".join(parts) + "\n"


def _table(axis: str, forms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    header = [axis.replace("num_", ""), *(f"{form}, {of}" for form in forms for of in _OF)]
    rows = [
        [f"{points[0][axis]:,}", *(cell for point in points for cell in _cells(point))]
        for points in zip(*forms.values(), strict=True)
    ]
    return report.table(header, rows)


_OF = ("time", "/ floor", "peak memory")


def _cells(point: Mapping[str, Any]) -> tuple[str, str, str]:
    if "skipped" in point:
        return "-", "-", "-"
    over = f"{point['median'] / point['floor']:.2f}" if point.get("floor") else "-"
    return report.duration(point["median"]), over, _memory(point["peak"])


def _slopes(axis: str, forms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Exponents fitted to the points, over all and over the large ones."""
    for form, points in forms.items():
        fits = []
        for least in (0, ASYMPTOTIC[axis]):
            for what, name in (("median", "time"), ("peak", "memory")):
                slope = _slope(axis, points, what, least)
                if slope is not None:
                    fits.append(f"{name} {slope:.2f}{f' from {least:,} on' if least else ''}")
        if fits:
            yield f"Slope, {form}: {', '.join(fits)}."


def _slope(axis: str, points: Sequence[Mapping[str, Any]], what: str, least: int) -> float | None:
    used = [(one[axis], one[what]) for one in points if one.get(what) and one[axis] >= least]
    if len(used) < 2:
        return None
    xs, ys = np.log(np.array(used, dtype=np.float64)).T
    return float(np.polyfit(xs, ys, 1)[0])


def _bars(curves: Curves) -> str:
    axis, million = "num_classes", NUM_CLASSES[-1]
    rows = []
    for form, points in curves[axis].items():
        if form == "textbook":
            continue
        for what, name in (("median", "time"), ("peak", "memory")):
            for least, where in ((0, "all"), (ASYMPTOTIC[axis], f"{ASYMPTOTIC[axis]:,} on")):
                slope = _slope(axis, points, what, least)
                met = None if slope is None else slope <= 1.1
                shown = "-" if slope is None else f"{slope:.2f}"
                bar = f"{form}: slope of {name} in classes, {where}"
                rows.append([bar, "1.1", shown, report.verdict(met)])
        for point in points:
            if point[axis] in FLOOR_AT and point.get("floor"):
                ratio = point["median"] / point["floor"]
                bar = f"{form}: time at {point[axis]:,} classes / floor"
                rows.append([bar, "1.7", f"{ratio:.2f}", report.verdict(ratio <= 1.7)])
        beyond = [_beyond(form, one) for one in points if one[axis] == million]
        shown, met = "-", None
        if beyond and beyond[0] is not None:
            shown, met = _memory(beyond[0]), beyond[0] < 2 * 2**30
        rows.append(
            [f"{form}: a million classes beyond centers and gradient", "2 GiB", shown,
             report.verdict(met)]
        )  # fmt: skip
    return report.table(["", "at most", "measured", ""], rows)


def _beyond(form: str, point: Mapping[str, Any]) -> int | None:
    """Under the paper's update centers have no gradient: nothing is taken off for it."""
    if point.get("peak") is None:
        return None
    gradient = 4 * point["num_classes"] * point["feature_dim"] if "gradient" in form else 0
    return int(point["peak"]) - gradient


def _limit(points: Sequence[Mapping[str, Any]]) -> str:
    free = min(point["free"] for point in points)
    most = math.isqrt(int(0.8 * free) // contenders.pairs_need(1))
    text = (
        "The textbook form holds two matrices of all pairs of classes at its peak. In 0.8 of the "
        f"{_memory(free)} that were free it fits up to about {most:,} classes"
    )
    skipped = [point["num_classes"] for point in points if "skipped" in point]
    if skipped:
        needs = contenders.pairs_need(skipped[0])
        text += f"; {skipped[0]:,}, which would need {_memory(needs)}, was not attempted"
    return text + "."


def _said(point: Mapping[str, Any]) -> str:
    return str(point.get("skipped") or ", ".join(_cells(point)))


def _memory(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**30:,.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


if __name__ == "__main__":
    _in_a_process(size=Size(*json.loads(sys.argv[2])), **json.loads(sys.argv[1]))
