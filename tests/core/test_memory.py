"""A step allocates nothing for pairs of classes, and nothing for samples times classes."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from separate_loss import SeparateLoss

# Different primes, so that a size identifies a dimension.
NUM_SAMPLES, NUM_CLASSES, FEATURE_DIM = 83, 97, 13


class Shapes(TorchDispatchMode):
    """Records the shapes of all results of operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.update(self._shapes(result))
        return result

    @staticmethod
    def _shapes(result: Any) -> Iterator[tuple[int, ...]]:
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                yield tuple(value.shape)


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_no_tensor_has_all_pairs_of_samples_or_classes(kind: str, center_update: Any) -> None:
    torch.manual_seed(0)
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update=center_update)
    features = torch.randn(NUM_SAMPLES, FEATURE_DIM, requires_grad=True)
    target = torch.randint(NUM_CLASSES, (NUM_SAMPLES,))
    if kind == "probabilities":
        target = torch.rand(NUM_SAMPLES, NUM_CLASSES).softmax(-1)
    with Shapes() as shapes:
        criterion(features, target).backward()
    assert (NUM_CLASSES, FEATURE_DIM) in shapes.seen
    for shape in shapes.seen:
        size = torch.Size(shape).numel()
        assert size <= max(NUM_SAMPLES, NUM_CLASSES) * FEATURE_DIM or (
            # Views of the given probabilities.
            kind == "probabilities" and sorted(shape) == [NUM_SAMPLES, NUM_CLASSES]
        ), shape
    if kind == "indices":
        assert not any({NUM_SAMPLES, NUM_CLASSES} <= set(shape) for shape in shapes.seen)


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_probabilities_are_not_copied(center_update: Any) -> None:
    torch.manual_seed(0)
    criterion = SeparateLoss(
        NUM_CLASSES, FEATURE_DIM, center_update=center_update, center_init="sphere"
    )
    features = torch.randn(NUM_SAMPLES, FEATURE_DIM, requires_grad=True)
    target = torch.rand(NUM_SAMPLES, NUM_CLASSES).softmax(-1)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in tree_iter(result):
                if isinstance(value, Tensor) and value.numel() == target.numel():
                    assert value.data_ptr() == target.data_ptr(), func
            return result

    with Copies():  # type: ignore[no-untyped-call]
        criterion(features, target).backward()


RESIDENT = """
import ctypes
import torch
from pathlib import Path
from separate_loss import SeparateLoss, metrics

libc = ctypes.CDLL(None)
if hasattr(libc, "mallopt"):
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed returns at once

def resident(which):
    status = Path("/proc/self/status").read_text()
    return int(status.split(which + ":")[1].split()[0]) * 1024

def growth(run):
    run(100)  # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    run(1)
    return resident("VmHWM") - before
"""

STEP = """
def step(num_classes):
    criterion = SeparateLoss(num_classes, 128, center_init="sphere", center_update=%r)
    features = torch.randn(256, 128, requires_grad=True)
    target = torch.randint(num_classes, (256,))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    criterion(features, target).backward()
    return resident("VmHWM") - before

step(10)  # loads libraries and starts threads
print(step(100_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_a_step_with_100_000_classes_needs_less_than_two_copies_of_the_centers(
    center_update: str,
) -> None:
    """A matrix of all pairs of centers would take 40 GB."""
    output = subprocess.run(
        [sys.executable, "-c", RESIDENT + STEP % center_update],
        capture_output=True,
        text=True,
        check=True,
    )
    # The resident set also grows by other memory that is touched for the first time.
    one_copy = 100_000 * 128 * 4
    if center_update == "gradient":
        assert one_copy * 0.9 <= int(output.stdout) < one_copy * 1.8, output.stdout
    else:
        # The update is in place.
        assert 0 < int(output.stdout) < one_copy * 0.8, output.stdout


METRICS = """
def growths(num_samples, num_classes, feature_dim, dtype, ignoring, as_map):
    features = torch.randn(num_samples, feature_dim).to(dtype)
    target = torch.randint(num_classes, (num_samples,))
    target[0] = -100 if ignoring else 0
    if as_map:
        features = features.view(-1, 10, 10, feature_dim).movedim(-1, 1).contiguous()
        features, target = features.movedim(1, -1), target.view(-1, 10, 10)
    centers = torch.randn(num_classes, feature_dim)
    part = lambda share: (features[: len(features) // share], target[: len(target) // share])
    size = features.numel() * features.element_size()
    yield "centers", growth(lambda n: metrics.class_centers(*part(n), num_classes)) / size
    yield "intra", growth(lambda n: metrics.intra_class_similarity(*part(n), centers)) / size
    yield "nearest", growth(
        lambda n: metrics.nearest_center(part(n)[0], centers, return_cosines=True)
    ) / size

for sizes in (400_000, 10, 64), (50_000, 1_000, 512):
    for dtype, *case in (torch.float32, False, False), (torch.float32, 1, 1), (torch.half, 1, 0):
        for name, share in growths(*sizes, dtype, *case):
            print(*sizes, dtype, *case, name, round(share, 3))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_metrics_need_at_most_one_and_a_half_copies_of_the_features() -> None:
    """In float64 at once, vectors and their directions would take four."""
    program = RESIDENT + METRICS
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    shares = {line: float(line.split()[-1]) for line in output.stdout.splitlines()}
    assert len(shares) == 18
    assert max(shares.values()) < 1.5, shares


def test_backward_frees_what_a_step_has_kept_for_it() -> None:
    """A loss that is kept, for example for logging, holds no batch."""
    features = torch.randn(31, 17, requires_grad=True)

    def batches() -> int:
        gc.collect()
        return sum(type(one) is torch.Tensor and one.shape == (31, 17) for one in gc.get_objects())

    before = batches()
    loss = SeparateLoss(5, 17)(features, torch.arange(31) % 5)
    assert batches() > before
    loss.backward()
    assert features.grad is not None
    features.grad = None
    assert batches() == before
