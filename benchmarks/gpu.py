"""What a step costs on a CUDA GPU, beside other losses: on the host, on the device, in launches.

The losses of a size take turns, and so do the trainings of ResNet-18. At most four minutes, with 60
GB of memory. Writes the tables of docs/cost.md.
"""

import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.harness import Results, format_time, make_parser, provenance, table, write
from benchmarks.losses import FORMS
from benchmarks.steps import Size, Step, draw_batch, prepare, prepare_training
from separate_loss._triton import backend

PAGE, BEGIN, END = Path("docs/cost.md"), "<!-- python -m benchmarks gpu -->", "<!-- end -->"
DEVICE = "cuda"
IMAGES = ((32, 128), (224, 256))  # pixels and samples of a training step
SIZES = ((128, 512, 7), (1_024, 512, 1_000), (256, 512, 10_000), (4_096, 512, 7), (512, 512, 10**6))
MANY = 100_000  # classes, above which the simplex form is left out
TURNS, STEPS, SECONDS = 50, 5, 20  # steps in a turn; the last turn starts before these seconds
# Names in `LOSSES`, with who runs them.
KERNELS = ", kernels"
OURS = [
    f"{loss}, {form}{how}"
    for form in FORMS
    for loss, ways in (("SeparateLoss", 3), ("SoftmaxSeparateLoss", 2))
    for how in (KERNELS, "", ", compiled")[:ways]
]
PEERS = ["center loss by gather", "center loss by matrix", "cross-entropy head"]
TRAININGS = [*OURS[3:5], f"{PEERS[2]} + {PEERS[0]}", PEERS[2]]

Steps = dict[str, Step]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes both files."""
    options = make_parser("gpu", __doc__, timing=True).parse_args(arguments)
    if not options.redraw and DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu needs a CUDA GPU, and torch finds none")
    few, turns = (1, 2) if options.quick else (None, TURNS)
    settings = {"images": IMAGES[:few], "sizes": SIZES[:few], "turns": turns}
    results = Results(options, "gpu", settings, DEVICE)
    images, sizes, turns = results.settings.values()
    for pixels, number in images:
        training = partial(_measure, partial(_trainings, pixels, number), turns)
        results.once(f"ResNet-18, {number} x 3 x {pixels} x {pixels}", training)
    for size in map(Size._make, sizes):
        results.once(str(size), partial(_measure, partial(_losses, size), turns))
    section = _section(results)
    print(section)
    if results.environment["gpu"] and turns == TURNS:
        (start, _), (_, end) = (PAGE.read_text().split(mark) for mark in (BEGIN, END))
        write(PAGE, f"{start}{BEGIN}\n\n{section}\n\n{END}{end}")


def _trainings(images: int, number: int) -> Steps:
    """A training step of ResNet-18 under each loss."""
    step = partial(prepare_training, images=images, number=number, device=DEVICE, autocast=True)
    return {name: step(name.removesuffix(KERNELS).split(" + ")) for name in TRAININGS}


def _losses(size: Size) -> Steps:
    """A step of each loss, the products of the simplex form alone, and a copy of the centers."""
    batch = draw_batch(size, DEVICE)
    centers = torch.randn(size.num_classes, size.feature_dim, device=DEVICE)
    few = centers if size.num_classes < size.feature_dim else centers.T
    steps = {
        name: prepare(name.removesuffix(KERNELS), *batch, size.num_classes)
        for name in OURS + PEERS
        if "simplex" not in name or size.num_classes <= MANY
    }
    products: Steps = {"products of the simplex form": lambda: few @ few.T @ few}
    return steps | {**products, "copy of the centers": centers.clone}


def _measure(prepare_steps: Callable[[], Steps], turns: int) -> dict[str, Any]:
    """Seconds of each step on the host, until it is done, and on the device; its launches."""
    gc.collect()
    torch._dynamo.reset()
    steps, found = prepare_steps(), {}
    for name, step in steps.items():  # compiles
        _turn(name, step)
    times: dict[str, list[tuple[list[float], float]]] = {name: [] for name in steps}
    end = time.perf_counter() + SECONDS
    for number in range(turns):
        for name, step in steps.items() if number < 2 or time.perf_counter() < end else ():
            times[name].append(_turn(name, step))
    for name, step in steps.items():
        with profile() as profiled:
            _turn(name, step)
        kernels = [
            event.time_range.elapsed_us()
            for event in profiled.events()
            if event.device_type.name == DEVICE.upper()
            and not getattr(event, "is_user_annotation", False)  # such as an optimizer's step
        ]
        host, done = zip(*times[name], strict=True)
        found[name] = {
            "steps": STEPS * len(done),
            "launches": round(len(kernels) / STEPS),
            "device": float(f"{sum(kernels) / STEPS / 1e6:.4g}"),
            "host": quantiles(chain(*host), method="inclusive"),
            "done": quantiles(done, method="inclusive"),
        }
    return found


def _turn(name: str, step: Step) -> tuple[list[float], float]:
    """Seconds until each of some steps is enqueued, and of one of them until all are done."""
    backend.BACKEND = "triton" if name.endswith(KERNELS) else "torch"
    times = [time.perf_counter()]
    for _ in range(STEPS):
        step()
        times.append(time.perf_counter())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    done = time.perf_counter() - times[0]
    return [after - start for start, after in pairwise(times)], done / STEPS


def _section(results: Results) -> str:
    """A table for each task; the first is of the training that waits for the host."""
    parts = [f"{provenance(results.environment)}."]
    for task, rows in results.measured.items():
        lines = [[name, *_cells(**row)] for name, row in rows.items()]
        parts.append(table([task, "on the host", "until done", "on the device", "launches"], lines))
    return "\n\n".join(parts)


def _cells(host: list[float], done: list[float], device: float, launches: int, **_: Any) -> Any:
    spreads = ("{1} ({0} to {2})".format(*map(format_time, times)) for times in (host, done))
    return *spreads, format_time(device), launches
