"""Steps that are timed: forward, backward to the features, and moved centers; time and memory."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.losses import LOSSES

Step = Callable[[], object]


class Size(NamedTuple):
    num_samples: int
    feature_dim: int
    num_classes: int

    def __str__(self) -> str:
        return "({:,}, {:,}, {:,})".format(*self)


def draw_batch(size: Size, device: str = "cpu") -> tuple[Tensor, Tensor]:
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
    with features.device:
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


def prepare_training(
    names: Sequence[str], images: int, number: int, device: str = "cpu", *, autocast: bool
) -> Step:
    """A step of ResNet-18 and SGD under the sum of some of `LOSSES`, heads among them."""
    from benchmarks.networks import backbone_classifier  # noqa: PLC0415 - slow

    with torch.device(device):
        body = backbone_classifier("resnet18", "none", 7).body
        criteria = [LOSSES[name].build(7, 512) for name in names]
        pictures = torch.randn(number, 3, images, images)
        target = torch.arange(number) % 7
    optimizer = torch.optim.SGD(nn.ModuleList([body, *criteria]).parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            features = body(pictures)
            first, *others = (criterion(features, target) for criterion in criteria)
        sum(others, first).backward()
        optimizer.step()

    return step


def floor_step(size: Size) -> Step:
    """The least work of a step: reads the centers once, and allocates and writes as much once."""
    centers = torch.randn(size.num_classes, size.feature_dim)
    return lambda: (centers.sum(), torch.empty_like(centers).fill_(1.0))


def measure(step: Step, seconds: float) -> dict[str, Any]:
    """Times a step for `seconds`; a slow one 5 times, but for no more than 20 times as long."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        once = time.perf_counter() - start
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    timed = timer.blocked_autorange(min_run_time=min(max(seconds, 5 * once), 20 * seconds))
    runs = timed.number_per_run * len(timed.times)
    return {"median": timed.median, "iqr": timed.iqr, "runs": runs}


def measure_step(size: Size, name: str, seconds: float) -> dict[str, Any]:
    """Times of a step and of the floor on the CPU, and the step's peak of memory."""
    free, loss = free_memory(), LOSSES[name]
    # Two float32 matrices (C, C), which a loss over pairs holds at its peak.
    needed = 8 * size.num_classes**2 if loss.pairs else 0
    if needed > 0.8 * free:
        needed, gib = needed // 2**30, free // 2**30
        skipped = f"not attempted: {needed:,} GiB for pairs of classes, {gib:,} GiB free"
        return {"skipped": skipped}
    gc.collect()
    torch._dynamo.reset()
    if not loss.compiled:  # loads libraries and starts threads
        prepare(name, *draw_batch(Size(8, size.feature_dim, 8)), 8)()
    features, target = draw_batch(size)
    step = prepare(name, features, target, size.num_classes)
    peak = _peak_memory(step)
    if features.grad is None or not features.grad.isfinite().all() or not features.grad.any():
        raise RuntimeError(f"{name}: no finite gradient reached the features")
    floor = measure(floor_step(size), seconds / 2)["median"]
    return {**measure(step, seconds), "floor": floor, "peak": peak}


def free_memory() -> int:
    """Bytes; 8 GiB where the system does not tell."""
    path = Path("/proc/meminfo")
    return _kibibytes(path, "MemAvailable") if path.exists() else 8 * 2**30


def _peak_memory(step: Step) -> int | None:
    """Bytes beyond what was allocated before the step; None where the system does not tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        step()
        return None
    reset.write_text("5")
    before = _kibibytes(status, "VmRSS")
    step()
    return max(0, _kibibytes(status, "VmHWM") - before)


def _kibibytes(path: Path, name: str) -> int:
    return int(path.read_text().split(f"{name}:")[1].split()[0]) * 1024
