"""The share of a whole training step of a ResNet-18 that the loss takes."""

from typing import Any

import torch
from monai.networks.nets.resnet import resnet18
from torch import nn
from torch.nn import functional as F

from benchmarks.contenders import CONTENDERS, Problem, Size
from benchmarks.timing import Step, measure
from separate_loss import SeparateLoss

__all__ = ["share"]

NUM_CLASSES, FEATURE_DIM = 7, 512
TURNS = 5


def share(
    *,
    images: int,
    batch_size: int,
    device: str,
    threads: int,
    seconds: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Medians of the step without and with the loss, in turns, and of the loss alone.

    A `dtype` of 16 bits is that of autocast for the model, and of the features.

    In turns, because what else the machine does changes more in minutes than the loss adds.
    """
    without, with_loss = (
        _training_step(images, batch_size, device, dtype, separate=separate)
        for separate in (False, True)
    )
    turns = [
        [measure(step, threads=threads, seconds=seconds)["median"] for step in (without, with_loss)]
        for _ in range(TURNS)
    ]
    size = Size(batch_size, FEATURE_DIM, NUM_CLASSES)
    contender = next(one for one in CONTENDERS if one.name == "SeparateLoss, paper")
    problem = Problem.draw(size, device)
    features = problem.features.detach().to(dtype).requires_grad_()
    step = contender.step(problem._replace(features=features))
    alone = measure(step, threads=threads, seconds=seconds)
    return {
        "images": images,
        "batch_size": batch_size,
        "without": [turn[0] for turn in turns],
        "with": [turn[1] for turn in turns],
        "alone": alone,
    }


def _training_step(
    images: int, batch_size: int, device: str, dtype: torch.dtype, *, separate: bool
) -> Step:
    torch.manual_seed(0)
    # As torchvision has it: stride 2 at the start, shortcuts by 1 x 1 convolution without bias.
    backbone = resnet18(
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_stride=2,
        bias_downsample=False,
        feed_forward=False,
    )
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(FEATURE_DIM, NUM_CLASSES)})
    model.to(device)
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, device=device) if separate else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    batch = torch.randn(batch_size, 3, images, images, device=device)
    target = torch.arange(batch_size, device=device) % NUM_CLASSES

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = model["backbone"](batch)
            logits = model["head"](features)
        loss = F.cross_entropy(logits.float(), target)
        if criterion is not None:
            loss = loss + 0.9 * criterion(features, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
