"""What a step costs on a CUDA GPU, beside other losses: on the host, on the device, in launches.

The losses of a size take turns, and so do the trainings of ResNet-18. At most four minutes, with 60
GB of memory. Writes its section of docs/cost.md; `--device cpu --quick` only tries the code.
"""

import gc
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.harness import Results, format_time, make_parser, provenance, table, write
from benchmarks.steps import Size, Step, draw_batch, prepare, prepare_training
from separate_loss._triton import backend

PAGE, BEGIN, END = Path("docs/cost.md"), "<!-- python -m benchmarks gpu -->", "<!-- end -->"
INTRODUCTION = """Medians of a step, with quartiles: until the host has enqueued it, until it is
done, and what its launches take on the device. First the training step that waits for the host:
ResNet-18 with bfloat16 autocast and SGD. Then each loss at (samples, features, classes): forward,
backward, and moved centers; by PyTorch's operators where nothing else is said. "-": it failed."""
IMAGES = ((32, 128), (224, 256))  # pixels and samples of a training step
SIZES = ((128, 512, 7), (1_024, 512, 1_000), (256, 512, 10_000), (4_096, 512, 7), (512, 512, 10**6))
MANY = 100_000  # classes, above which the simplex form is left out
TURNS, STEPS, SECONDS = 50, 5, 20  # steps in a turn; the last turn starts before these seconds
# Names in `LOSSES`, with who runs them.
KERNELS = ", kernels"
OURS = [
    f"{loss}, {form}{how}"
    for form in ("simplex", "paper")
    for loss, ways in (("SeparateLoss", 3), ("SoftmaxSeparateLoss", 2))
    for how in (KERNELS, "", ", compiled")[:ways]
]
PEERS = ["center loss by gather", "center loss by matrix", "cross-entropy head"]
TRAININGS = [*OURS[3:5], f"{PEERS[2]} + {PEERS[0]}", PEERS[2]]

Prepared = dict[str, Callable[[], Step]]


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes both files."""
    parser = make_parser("gpu", __doc__, timing=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    device = "cpu" if options.redraw else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu needs a CUDA GPU, and torch finds none")
    torch.set_num_threads(options.threads)
    settings = {"images": IMAGES, "sizes": SIZES, "turns": TURNS}
    if options.quick:
        settings = {"images": ((32, 4),), "sizes": SIZES[:1], "turns": 2}
    results = Results(options, "gpu", settings, device)
    images, sizes, turns = results.settings.values()
    tasks = {f"ResNet-18, {n} x 3 x {s} x {s}": partial(_trainings, s, n) for s, n in images}
    tasks |= {str(size): partial(_losses, size) for size in map(Size._make, sizes)}
    for name, prepared in tasks.items():
        print(name, flush=True)
        results.once(name, partial(_measure, prepared, device, turns))
    section = _section(results)
    print(section)
    if results.environment["gpu"] and turns == TURNS:
        (start, _), (_, end) = (PAGE.read_text().split(mark) for mark in (BEGIN, END))
        write(PAGE, f"{start}{BEGIN}\n\n{section}\n\n{END}{end}")


def _trainings(images: int, number: int, device: str) -> Prepared:
    """A training step of ResNet-18 under each loss."""
    step = partial(prepare_training, images=images, number=number, device=device, autocast=True)
    return {name: partial(step, name.removesuffix(KERNELS).split(" + ")) for name in TRAININGS}


def _losses(size: Size, device: str) -> Prepared:
    """A step of each loss, the products of the simplex form alone, and a copy of the centers."""
    batch, centers = draw_batch(size, device), torch.randn(size[2], size[1], device=device)
    few = centers if size.num_classes < size.feature_dim else centers.T
    steps: Prepared = {
        name: partial(prepare, name.removesuffix(KERNELS), *batch, size.num_classes)
        for name in OURS + PEERS
    }
    steps["products of the simplex form"] = lambda: lambda: few @ few.T @ few
    steps["copy of the centers"] = lambda: centers.clone
    return {n: one for n, one in steps.items() if "simplex" not in n or size.num_classes <= MANY}


def _measure(prepared: Callable[[str], Prepared], device: str, turns: int) -> dict[str, Any]:
    """Seconds of each step on the host, until it is done, and on the device; its launches."""
    gc.collect()
    torch._dynamo.reset()
    before, found, ready = backend.BACKEND, dict[str, Any](), dict[str, Any]()
    for name, build in prepared(device).items():
        found[name] = {"host": [], "done": []}
        try:
            chosen = "triton" if name.endswith(KERNELS) else "torch"
            ready[name] = partial(_turn, build(), chosen, device)
            ready[name]()
        except Exception as error:  # the others are worth measuring
            traceback.print_exc()
            ready.pop(name, None)
            found[name] = {"failed": str(error).split("\n")[0]}
    end = time.perf_counter() + SECONDS
    for number in range(turns):
        for name, turn in ready.items() if number < 2 or time.perf_counter() < end else ():
            host, done = turn()
            found[name]["host"] += host
            found[name]["done"].append(done)
    for name, turn in ready.items():
        with profile() as profiled:
            turn()
        kernels = [
            event.time_range.elapsed_us()
            for event in profiled.events()
            if event.device_type.name == device.upper()
            and not getattr(event, "is_user_annotation", False)  # such as an optimizer's step
        ]
        found[name] = {
            "steps": len(found[name]["host"]),
            "launches": round(len(kernels) / STEPS),
            "device": float(f"{sum(kernels) / STEPS / 1e6:.4g}"),
            **{key: quantiles(one, method="inclusive") for key, one in found[name].items()},
        }
    backend.BACKEND = before
    return found


def _turn(step: Step, chosen: str, device: str) -> tuple[list[float], float]:
    """Seconds until each of some steps is enqueued, and of one of them until all are done."""
    backend.BACKEND = chosen
    times = [time.perf_counter()]
    for _ in range(STEPS):
        step()
        times.append(time.perf_counter())
    if device == "cuda":
        torch.cuda.synchronize()
    done = time.perf_counter() - times[0]
    return [after - start for start, after in pairwise(times)], done / STEPS


def _section(results: Results) -> str:
    """A table for each task; the first is of the training that waits for the host."""
    keys = ("host", "done", "device", "launches")
    parts = [INTRODUCTION, f"{provenance(results.environment)}."]
    for task, rows in results.measured.items():
        lines = [[name, *(_cell(one.get(key)) for key in keys)] for name, one in rows.items()]
        parts.append(table([task, "on the host", "until done", "on the device", "launches"], lines))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "{1} ({0} to {2})".format(*map(format_time, value))
    return format_time(value) if isinstance(value, float) else str(value or "-")
