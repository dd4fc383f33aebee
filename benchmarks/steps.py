"""Time and memory of a step: forward, backward to the features, and moved centers."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.losses import LOSSES

Step = Callable[[], None]


class Size(NamedTuple):
    num_samples: int
    feature_dim: int
    num_classes: int

    def __str__(self) -> str:
        return "({:,}, {:,}, {:,})".format(*self)


def draw_batch(size: Size, device: str) -> tuple[Tensor, Tensor]:
    """Features and target, with about four samples of each class in them: triplets exist."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size.num_samples, size.feature_dim, generator=generator)
    present = max(2, min(size.num_classes, size.num_samples // 4))
    classes = torch.randperm(size.num_classes, generator=generator)[:present]
    target = classes[torch.arange(size.num_samples) % present]
    return features.to(device).requires_grad_(), target.to(device)


def prepare(name: str, features: Tensor, target: Tensor, num_classes: int) -> Step:
    """The step of one of `LOSSES`."""
    loss = LOSSES[name]
    gc.collect()
    torch._dynamo.reset()
    criterion = loss.build(num_classes, features.shape[1]).to(features.device)
    call = torch.compile(criterion, fullgraph=True) if loss.compiled else criterion
    parameters = list(criterion.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-3) if loss.sgd else None

    def step() -> None:
        for leaf in (features, *parameters):
            leaf.grad = None
        call(features, target).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def floor_step(size: Size, device: str) -> Step:
    """The least work of a step: reads the centers once, and allocates and writes as much once."""
    centers = torch.randn(size.num_classes, size.feature_dim, device=device)

    def step() -> None:
        centers.sum()
        torch.empty_like(centers).fill_(1.0)

    return step


def measure(step: Step, threads: int, seconds: float) -> dict[str, Any]:
    """Times a step for `seconds`; a slow one 5 times, but for no more than 20 times as long."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        once = time.perf_counter() - start
    timer = Timer("step()", globals={"step": step}, num_threads=threads)
    timed = timer.blocked_autorange(min_run_time=min(max(seconds, 5 * once), 20 * seconds))
    runs = timed.number_per_run * len(timed.times)
    return {"median": timed.median, "iqr": timed.iqr, "runs": runs}


def measure_step(
    name: str, size: Size, device: str, threads: int, seconds: float
) -> dict[str, Any]:
    """Times of a step and of the floor, and the step's peak of memory."""
    torch.set_num_threads(threads)
    free, loss = free_memory(device), LOSSES[name]
    # Two float32 matrices (C, C), which a loss over pairs holds at its peak.
    needed = 8 * size.num_classes**2 if loss.pairs else 0
    if needed > 0.8 * free:
        needed, gib = needed // 2**30, free // 2**30
        skipped = f"not attempted: {needed:,} GiB for pairs of classes, {gib:,} GiB free"
        return {"skipped": skipped}
    if not loss.compiled:  # loads libraries and starts threads
        prepare(name, *draw_batch(Size(8, size.feature_dim, 8), device), 8)()
    features, target = draw_batch(size, device)
    step = prepare(name, features, target, size.num_classes)
    peak = _peak_memory(step, device)
    if features.grad is None or not features.grad.isfinite().all() or not features.grad.any():
        raise RuntimeError(f"{name}: no finite gradient reached the features")
    floor = measure(floor_step(size, device), threads, seconds / 2)["median"]
    return {**measure(step, threads, seconds), "floor": floor, "peak": peak}


def free_memory(device: str) -> int:
    """Bytes; 8 GiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    return _kibibytes(path, "MemAvailable") if path.exists() else 8 * 2**30


def _peak_memory(step: Step, device: str) -> int | None:
    """Bytes beyond what was allocated before the step; None where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not reset.exists():
        step()
        return None
    reset.write_text("5")
    before = _kibibytes(status, "VmRSS")
    step()
    return max(0, _kibibytes(status, "VmHWM") - before)


def _kibibytes(path: Path, name: str) -> int:
    return int(path.read_text().split(f"{name}:")[1].split()[0]) * 1024
