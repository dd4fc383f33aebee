"""Steps that are timed: forward, backward to the features, and moved centers; time and memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.losses import LOSSES

Step = Callable[[], object]
# What any loss must do that moves its centers, or returns a gradient for them.
ONCE = "reading and writing the centers once"


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
    classes = torch.randperm(size.num_classes, generator=generator)
    target = classes[torch.arange(size.num_samples) % max(2, size.num_samples // 4) % len(classes)]
    return features.to(device).requires_grad_(), target.to(device)


def prepare(name: str, features: Tensor, target: Tensor, num_classes: int) -> Step:
    """The step of one of `LOSSES`, or `ONCE`."""
    if name == ONCE:
        centers = torch.randn(num_classes, features.shape[1])
        return lambda: (centers.sum(), torch.empty_like(centers).fill_(1.0))
    loss = LOSSES[name]
    with features.device:
        criterion = loss.build(num_classes, features.shape[1])
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


def measure(step: Step, seconds: float) -> dict[str, float]:
    """Times a step for `seconds`; a slow one 5 times, but for no more than 20 times as long."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    once = timer.timeit(1).median  # after two more
    timed = timer.blocked_autorange(min_run_time=min(max(seconds, 5 * once), 20 * seconds))
    measured = {"median": timed.median, "iqr": timed.iqr}
    return {**measured, "runs": timed.number_per_run * len(timed.times)}


def measure_step(size: Size, name: str, seconds: float) -> dict[str, float]:
    """Times of a step on the CPU, and its peak of memory."""
    if not name.endswith("compiled"):  # loads libraries and starts threads
        prepare(name, *draw_batch(Size(8, size.feature_dim, 8)), 8)()
    step = prepare(name, *draw_batch(size), size.num_classes)
    peak = _peak_memory(step)
    return {**measure(step, seconds), "peak": peak}


def _peak_memory(step: Step) -> int:
    """Bytes beyond what was allocated before the step."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    step()
    return max(0, _memory("VmHWM") - before)


def _memory(name: str) -> int:
    """Bytes of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])
