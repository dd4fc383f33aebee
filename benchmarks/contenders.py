"""What is measured: a step of each loss, forward, backward to the features, and centers moved.

Losses with centers of their own (center, island, textbook loss, and ours under
`center_update="gradient"`) have them moved by a step of torch's SGD, outside of what is compiled;
the paper's update moves them in the call. Heads and proxies (cross-entropy, CosFace, ArcFace,
ProxyAnchor) get their gradient and no step, which is in their favour.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import baselines
from benchmarks.timing import Step
from separate_loss import SeparateLoss, SoftmaxSeparateLoss, functional

__all__ = [
    "CONTENDERS",
    "Contender",
    "Problem",
    "Size",
    "as_it_is",
    "available",
    "floor",
    "pairs_need",
]

Role = Literal["ours", "textbook", "rival", "head"]
Wrap = Callable[[Any], Any]


class Size(NamedTuple):
    num_samples: int
    feature_dim: int
    num_classes: int

    def __str__(self) -> str:
        return "({:,}, {:,}, {:,})".format(*self)


class Problem(NamedTuple):
    """A batch, the same for all."""

    features: Tensor  # (N, d), a leaf that requires its gradient
    target: Tensor  # (N,)
    num_classes: int

    @classmethod
    def draw(cls, size: Size, device: str) -> "Problem":
        """About four samples of each class in the batch, so that triplets exist."""
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(size.num_samples, size.feature_dim, generator=generator)
        present = max(2, min(size.num_classes, size.num_samples // 4))
        classes = torch.randperm(size.num_classes, generator=generator)[:present]
        target = classes[torch.arange(size.num_samples) % present]
        return cls(features.to(device).requires_grad_(), target.to(device), size.num_classes)


class Contender(NamedTuple):
    name: str
    role: Role  # rival: holds centers or mines triplets; head: stands in the classifier's place
    build: Callable[[Problem, Wrap], Step]
    compiled: bool = False
    pairs: bool = False  # allocates matrices of all pairs of classes

    def step(self, problem: Problem) -> Step:
        """A step that ran once and brought the features their gradient."""
        gc.collect()
        torch._dynamo.reset()
        wrap: Wrap = partial(torch.compile, fullgraph=True) if self.compiled else as_it_is
        step = self.build(problem, wrap)
        step()
        grad = problem.features.grad
        if grad is None or not bool(grad.isfinite().all()) or not bool(grad.any()):
            raise RuntimeError(f"{self.name}: no finite gradient reached the features")
        return step

    def needs(self, size: Size) -> int:
        """Bytes of what it allocates over pairs of classes."""
        return pairs_need(size.num_classes) if self.pairs else 0


def pairs_need(num_classes: int) -> int:
    """Bytes of the two matrices (C, C) in float32 that a loss over pairs holds at its peak."""
    return 2 * 4 * num_classes**2


def available(device: str) -> int:
    """Bytes of memory that are free; where the system does not tell, 8 GiB are assumed."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except OSError:
        return 8 * 2**30


def floor(size: Size, device: str) -> Step:
    """Reads the centers once, then allocates a tensor of their size and writes it."""
    centers = torch.randn(size.num_classes, size.feature_dim, device=device)

    def step() -> None:
        centers.sum()
        torch.empty_like(centers).fill_(1.0)

    return step


def as_it_is(function: Any) -> Any:
    """In place of torch.compile."""
    return function


def _step(criterion: nn.Module, problem: Problem, wrap: Wrap, *, moves: bool) -> Step:
    """Forward, backward, and where parameters move, a step of SGD."""
    features, target, _ = problem
    criterion.to(features.device)
    call = wrap(criterion)
    leaves = [features, *criterion.parameters()]
    optimizer = torch.optim.SGD(leaves[1:], lr=1e-3) if moves and leaves[1:] else None

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        call(features, target).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def _functional(problem: Problem, wrap: Wrap) -> Step:
    features, target, num_classes = problem
    centers = torch.randn(num_classes, features.shape[1], device=features.device)

    def loss_and_centers(features: Tensor, target: Tensor, centers: Tensor) -> tuple[Any, Tensor]:
        loss = functional.separate_loss(features, target, centers)
        moved = functional.update_centers(features.detach(), target, centers, center_lr=10.0)
        return loss, moved

    call = wrap(loss_and_centers)

    def step() -> None:
        nonlocal centers
        features.grad = None
        loss, centers = call(features, target, centers)
        loss.backward()

    return step


def _module(
    center_update: Literal["paper", "gradient"], *, moves: bool = False
) -> Callable[[Problem, Wrap], Step]:
    def build(problem: Problem, wrap: Wrap) -> Step:
        features, _, num_classes = problem
        criterion = SeparateLoss(num_classes, features.shape[1], center_update=center_update)
        _scatter(criterion)
        return _step(criterion, problem, wrap, moves=moves)

    return build


def _scatter(criterion: SeparateLoss) -> None:
    """Centers as late in training: none waits for the first sample of its class."""
    with torch.no_grad():
        criterion.centers.normal_()


def _head(problem: Problem) -> nn.Linear:
    features, _, num_classes = problem
    return nn.Linear(features.shape[1], num_classes).to(features.device)


def _softmax_separate(problem: Problem, wrap: Wrap) -> Step:
    head = _head(problem)
    criterion = SoftmaxSeparateLoss(head)
    _scatter(criterion.separate)

    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.criterion = head, criterion

        def forward(self, features: Tensor, target: Tensor) -> Any:
            return criterion(head(features), target)

    return _step(Joint(), problem, wrap, moves=False)


def _cross_entropy(problem: Problem, wrap: Wrap) -> Step:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = _head(problem)

        def forward(self, features: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(features), target)

    return _step(Joint(), problem, wrap, moves=False)


def _loss(
    build: Callable[[int, int], nn.Module], *, moves: bool = False
) -> Callable[[Problem, Wrap], Step]:
    """A loss from the number of classes and the feature size."""

    def step(problem: Problem, wrap: Wrap) -> Step:
        features, _, num_classes = problem
        return _step(build(num_classes, features.shape[1]), problem, wrap, moves=moves)

    return step


def _from_pml(name: str) -> Callable[[Problem, Wrap], Step]:
    """A loss of pytorch-metric-learning, imported only when measured: it takes a while."""

    def build(num_classes: int, feature_dim: int) -> nn.Module:
        from pytorch_metric_learning import losses  # noqa: PLC0415

        loss: nn.Module = getattr(losses, name)(num_classes, feature_dim)
        return loss

    return _loss(build)


class _MinedTriplets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from pytorch_metric_learning import losses, miners  # noqa: PLC0415

        self.miner, self.loss = miners.BatchHardMiner(), losses.TripletMarginLoss()

    def forward(self, features: Tensor, target: Tensor) -> Any:
        return self.loss(features, target, self.miner(features, target))


_TEXTBOOK = _loss(baselines.TextbookSeparateLoss, moves=True)

CONTENDERS = (
    Contender("functional", "ours", _functional),
    Contender("functional, compiled", "ours", _functional, compiled=True),
    Contender("SeparateLoss, paper", "ours", _module("paper")),
    Contender("SeparateLoss, paper, compiled", "ours", _module("paper"), compiled=True),
    Contender("SeparateLoss, gradient", "ours", _module("gradient", moves=True)),
    Contender(
        "SeparateLoss, gradient, compiled", "ours", _module("gradient", moves=True), compiled=True
    ),
    # What the loss does of it: the floor, too, ends with a gradient.
    Contender("SeparateLoss, gradient, no step", "ours", _module("gradient")),
    Contender("SoftmaxSeparateLoss", "ours", _softmax_separate),
    Contender("SoftmaxSeparateLoss, compiled", "ours", _softmax_separate, compiled=True),
    Contender("textbook", "textbook", _TEXTBOOK, pairs=True),
    Contender("textbook, compiled", "textbook", _TEXTBOOK, compiled=True, pairs=True),
    Contender("center loss", "rival", _loss(baselines.CenterLoss, moves=True)),
    Contender("center loss by matrix", "rival", _loss(baselines.CenterLossByMatrix, moves=True)),
    Contender("island loss", "rival", _loss(baselines.IslandLoss, moves=True), pairs=True),
    Contender("triplet, batch-hard", "rival", _loss(lambda *_: baselines.BatchHardTripletLoss())),
    Contender("PML triplet, BatchHardMiner", "rival", _loss(lambda *_: _MinedTriplets())),
    Contender("PML ProxyAnchor", "rival", _from_pml("ProxyAnchorLoss")),
    Contender("PML CosFace", "head", _from_pml("CosFaceLoss")),
    Contender("PML ArcFace", "head", _from_pml("ArcFaceLoss")),
    Contender("cross-entropy head", "head", _cross_entropy),
)
